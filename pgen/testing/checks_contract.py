"""Checks of form: what a backend is, what it says before any work is done, and that it keeps to it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from pgen.capability import Exactness, Offer, Query, Rank, Refusal
from pgen.errors import PgenError, Refused, Unanswerable
from pgen.inspection import structure_of
from pgen.registry import Registry
from pgen.testing.subject import NotApplicable, Subject


def is_a_frozen_dataclass(subject: Subject) -> None:
    """A frozen dataclass with a class attribute `name`; its fields are its options and make an equal one."""
    backend: Any = subject.backend
    kind = type(backend)
    _claim(
        dataclasses.is_dataclass(backend),
        f"{kind.__name__} is no dataclass; write @dataclass(frozen=True) above it",
    )
    _claim(kind.__dataclass_params__.frozen, f"{kind.__name__} is not frozen; write @dataclass(frozen=True)")
    name = getattr(kind, "name", None)
    _claim(
        isinstance(name, str) and bool(name),
        f"{kind.__name__}.name is {name!r}; expected a class attribute, a string",
    )
    _claim(
        "name" not in {f.name for f in dataclasses.fields(backend)},
        f"{kind.__name__}.name is a field; make it a class attribute: name: ClassVar[str] = {name!r}",
    )
    twin = dataclasses.replace(backend)
    _claim(twin == backend, f"dataclasses.replace({kind.__name__}(...)) makes one that differs from it")
    _claim(
        repr(twin) == repr(backend), f"two equal {kind.__name__} print differently: {backend!r} and {twin!r}"
    )


def serves_something(subject: Subject) -> None:
    """It offers to serve one of the problems at least: what refuses them all is held against nothing."""
    raise NotApplicable("judged over all problems")  # replaced by the conformance kit, which knows them all


def says_what_it_offers_or_lacks(subject: Subject) -> None:
    """`examine` gives an `Offer` or a `Refusal` with a reason, in known terms, and names no other backend."""
    answer = subject.answer
    _claim(
        isinstance(answer, (Offer, Refusal)),
        f"examine gave {type(answer).__name__}; expected pgen.Offer or pgen.Refusal",
    )
    _claim(
        isinstance(answer.why, str) and bool(answer.why.strip()),
        f"{type(answer).__name__}.why is empty; say why in a sentence",
    )
    sites = subject.structure.sites
    if isinstance(answer, Refusal):
        _claim(bool(answer.missing), "Refusal.missing is empty; name the property that is missing")
        _claim(
            answer.site is None or answer.site in sites,
            f"Refusal.site is {answer.site!r}, which is none of {', '.join(sites)}",
        )
        other = _other_backend(f"{answer.missing} {answer.why}", type(subject.backend).name)
        _claim(
            other is None,
            f"the refusal recommends the backend {other!r}, which may not be installed; name what is "
            f"missing: {answer.why}",
        )
        return
    _claim(bool(answer.answers), "the offer answers nothing; refuse instead")
    _claim(
        all(isinstance(q, Query) for q in answer.answers),
        f"the offer answers {list(answer.answers)}; expected members of pgen.Query",
    )
    _claim(
        all(isinstance(e, Exactness) for e in answer.answers.values()),
        f"the offer promises {list(answer.answers.values())}; expected members of pgen.Exactness",
    )
    _claim(
        isinstance(answer.rank, Rank), f"the offer's rank is {answer.rank!r}; expected a member of pgen.Rank"
    )
    known = {c.name for c in subject.structure.conversions}
    for site, path in answer.paths.items():
        _claim(
            site in sites, f"the offer has a path for {site!r}, which is none of the sites {', '.join(sites)}"
        )
        strange = [name for name in path if name not in known]
        _claim(
            not strange,
            f"the path of {site!r} goes through {strange}, which is no installed conversion; use "
            "pgen.names_of",
        )


def examines_without_a_trace(subject: Subject) -> None:
    """`examine` is a pure function of the structure: the same answer again, and nothing is changed."""
    first = subject.answer
    _claim(
        not subject.examine_changed,
        f"examine changed {', '.join(subject.examine_changed)}; it must be a pure function of the structure",
    )
    second = subject.backend.examine(subject.structure)
    _claim(first == second, f"examine answers differently when asked twice: {first} and {second}")


def refuses_what_it_cannot_serve(subject: Subject) -> None:
    """An unsuitable program is refused by `examine`, naming the site in the way; if offered, it works."""
    reference, answer = subject.reference, subject.answer
    if isinstance(answer, Refusal):
        named = answer.site is not None or any(name in answer.why for name in subject.structure.params)
        _claim(
            named or not reference.offending,
            f"refused {reference.name} without saying what is in the way: Refusal.site is None, and why "
            f"is {answer.why!r}",
        )
        return
    _claim(
        not reference.must_refuse,
        f"offered to fit {reference.name}: {_summary(subject.program)} Refuse it; "
        "pgen.learned_factor(structure) finds it",
    )
    try:
        fitted = subject.short_fit()
        for query in fitted.offer.answers:
            subject.ask_bare(query, 2, fitted)
    except NotApplicable:
        refused = isinstance(subject.fit_error, Refused)
        if not refused:
            raise AssertionError(
                f"offered to fit {reference.name}, and then fit raised {_said(subject.fit_error)}"
            ) from subject.fit_error
    except Refused:
        return  # what only a run of the program shows may be refused by fit
    except Exception as error:
        raise AssertionError(f"offered to fit {reference.name}, and then raised {_said(error)}") from error


def fits_and_answers(subject: Subject) -> None:
    """After an offer, `fit` gives a fit that answers every query offered; its program has the same sites."""
    _ = subject.offer
    try:
        fitted = subject.fitted
    except NotApplicable:
        if subject.fit_error is None:
            raise
        raise AssertionError(f"fit raised {_said(subject.fit_error)} after an offer") from subject.fit_error
    for query in fitted.offer.answers:
        for n in (1, 5):
            try:
                subject.ask_bare(query, n, fitted)
            except Exception as error:
                raise AssertionError(f"{query.value} was offered and raised {_said(error)}") from error
    again = structure_of(fitted.program, subject.data)
    _claim(
        list(again.sites) == list(subject.structure.sites),
        f"fitted.program has the sites {list(again.sites)}, not those of the program",
    )


def fits_in_no_steps(subject: Subject) -> None:
    """A run of no steps gives a fit that answers too (loading relies on it); the seed is recorded."""
    _ = subject.fitted
    fitted = subject.fit(dataclasses.replace(subject.settings.run, steps=0), seed=17)
    _claim(fitted.seed == 17, f"fitted.seed is {fitted.seed}; expected the seed given, 17")
    _claim(fitted.history.steps == 0, f"a run of no steps has a history of {fitted.history.steps}")
    for query in fitted.offer.answers:
        subject.ask(query, 5)  # where that raises, it is told elsewhere
        try:
            subject.ask_bare(query, 2, fitted)
        except Exception as error:
            raise AssertionError(f"after a fit of no steps, {query.value} raised {_said(error)}") from error


def answers_only_what_it_offered(subject: Subject) -> None:
    """A query not offered raises `Unanswerable`, and nothing is answered more exactly than offered."""
    fitted = subject.fitted
    questions = {
        Query.SAMPLE: lambda: fitted.sample(2, seed=3),
        Query.LOG_PROB: lambda: fitted.log_prob(seed=3),
        Query.POSTERIOR: lambda: fitted.posterior(n=2, seed=3),
        Query.MARGINALS: lambda: fitted.marginals(seed=3),
    }
    for query in questions.keys() - fitted.offer.answers.keys():
        try:
            questions[query]()
        except Unanswerable as error:
            _claim(query.value in str(error), f"the error does not name {query.value}: {error}")
        else:
            raise AssertionError(f"{query.value} was not offered, and was answered")
    method = {q for q in Query if q in fitted.offer.answers and not hasattr(fitted._answers, q.value)}
    _claim(
        not method,
        f"{', '.join(sorted(q.value for q in method))} was offered, but what fit returned has no such method",
    )
    if Query.LOG_PROB in fitted.offer.answers:
        offered, kind = fitted.offer.answers[Query.LOG_PROB], subject.log_prob().kind
        _claim(
            kind.strength <= offered.strength,
            f"log_prob was offered as {offered.value!r} and answered as {kind.value!r}",
        )


def _other_backend(text: str, own: str) -> str | None:
    """Another backend that the text recommends: its name in quotes, or beside the word "backend"."""
    for name in Registry.installed().backends:
        word = re.escape(name.rpartition(":")[2])
        if name != own and re.search(rf"['\"`]{word}['\"`]|backend\W{{1,3}}{word}\b|\b{word} backend", text):
            return name
    return None


def _summary(program: object) -> str:
    documented = program if hasattr(program, "__code__") else type(program)
    return (documented.__doc__ or "").partition("\n")[0]


def _said(error: BaseException | None) -> str:
    kind = "" if isinstance(error, PgenError) else " (no pgen error)"
    return f"{type(error).__name__}{kind}: {error}"


def _claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
