"""Checks of manners: global state, the user's data and weights and the seed are respected; saved is saved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgen.capability import Query
from pgen.fitting import load
from pgen.testing.checks_contract import _claim
from pgen.testing.subject import NotApplicable, Subject, changed, observe, weights_of


def leaves_global_state_alone(subject: Subject) -> None:
    """Fitting and asking change no global state, not even settings that pgen would restore (dtype, ...)."""
    _ask_everything(subject)
    _claim(
        not subject.trespasses,
        f"{'; '.join(dict.fromkeys(subject.trespasses))}; draw from the generators as they are, and set "
        "nothing",
    )


def leaves_inputs_alone(subject: Subject) -> None:
    """The data and the weights of the user's modules are what they were, and were not even written to."""
    _ask_everything(subject)
    for name, value in subject.data.items():
        _claim(
            torch.equal(value, subject.reference.data[name]), f"the data {name!r} was changed; work on a copy"
        )
        _claim(
            value._version == subject.versions[name],
            f"the data {name!r} was written to, if only with what it held; work on a copy",
        )
    for name, value in weights_of(subject.program).items():
        _claim(
            torch.equal(value, subject.weights[name]),
            f"the weight {name!r} of the user's module was changed; train Parameters.of(problem)",
        )


def is_repeatable(subject: Subject) -> None:
    """The same seed gives the same fit and the same answers."""
    first, second = subject.short_fit(seed=5), subject.short_fit(seed=5, again=True)
    for name, value in first._answers.tensors().items():
        _claim(
            torch.equal(value, second._answers.tensors()[name]),
            f"two fits with one seed differ in the learned {name!r}",
        )
    for query in first.offer.answers:
        subject.ask(query, 5)  # where that raises, it is told elsewhere
        a, b = (_tensors_of(subject.ask_bare(query, 20, fitted, seed=7)) for fitted in (first, second))
        for name in a:
            _claim(
                _equal(a[name], b[name]),
                f"{query.value} differs in {name} between two fits and questions with the same seeds",
            )


def minds_the_seed(subject: Subject) -> None:
    """Other seeds give other draws."""
    asked = [
        q for q in (Query.SAMPLE, Query.POSTERIOR) if q in subject.offer.answers and _has_sites(subject, q)
    ]
    if not asked:
        raise NotApplicable("no draws are offered")
    for query in asked:
        a, b = (_tensors_of(subject.ask(query, 200, seed=seed)) for seed in (11, 12))
        _claim(
            any(not _equal(a[name], b[name]) for name in a),
            f"{query.value} gives the same draws for two seeds; draw from torch's global generator, "
            "which pgen seeds",
        )


def survives_saving(subject: Subject) -> None:
    """A fit that was saved and loaded answers as before, and loading changes no global state."""
    fitted = subject.short_fit(seed=5)
    answers: dict[Query, dict[str, Tensor]] = {}
    for query in fitted.offer.answers:
        subject.ask(query, 5)  # where that raises, it is told elsewhere
        answers[query], again = (_tensors_of(subject.ask_bare(query, 20, fitted, seed=7)) for _ in range(2))
        if any(not _equal(answers[query][name], again[name]) for name in again):
            raise NotApplicable(f"{query.value} is not repeatable: see is_repeatable")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        fitted.save(path)
        before = observe()
        loaded = load(path, subject.program, backend=subject.spy())
        touched = [
            name
            for name in changed(before, observe())
            if f"pgen.fit changed {name}" not in subject.trespasses
        ]
    _claim(not touched, f"loading changed {', '.join(touched)}")
    _claim(loaded.seed == fitted.seed, f"the seed was {fitted.seed} and is {loaded.seed} after loading")
    _claim(loaded.offer.answers == fitted.offer.answers, "the offer differs after loading")
    for query, before_saving in answers.items():
        after = _tensors_of(subject.ask_bare(query, 20, loaded, seed=7))
        for name, value in before_saving.items():
            close = value.shape == after[name].shape and torch.allclose(
                value.double(), after[name].double(), rtol=1e-5, atol=1e-6, equal_nan=True
            )
            _claim(
                close,
                f"{query.value} differs in {name} after saving and loading; tensors() and load() must "
                "carry all that was learned",
            )


def _ask_everything(subject: Subject) -> None:
    fitted = subject.fitted
    for query in fitted.offer.answers:
        subject.ask(query, 5)


def _has_sites(subject: Subject, query: Query) -> bool:
    return query is Query.SAMPLE or bool(subject.structure.latents)


def _tensors_of(answer: Any) -> dict[str, Tensor]:
    """Every tensor of an answer, by name."""
    if isinstance(answer, Mapping):
        return {
            name: part for key, value in answer.items() for name, part in _named(repr(key), value).items()
        }
    return {name: getattr(answer, name) for name in ("value", "stderr") if getattr(answer, name) is not None}


def _named(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    found = {}
    for moment in ("mean", "variance", "probs"):
        try:
            part = getattr(value, moment)
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(part, Tensor):
            found[f"{name}.{moment}"] = part
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
