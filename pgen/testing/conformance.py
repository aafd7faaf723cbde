"""`conformance`: everything that a backend promises, held against problems with exact answers.

In a test module of a plugin:

    from pgen.testing import conformance
    from pgen_rejection import Rejection

    test_conformance = conformance(Rejection())

gives one test for each check on each problem, `test_conformance[log_prob_is_true[hmm]]`, chosen by what the
backend itself offers; what it refuses or does not offer is skipped. Without pytest:

    >>> report = conformance_report(backend)              # doctest: +SKIP
    >>> report.ok, print(report)                          # doctest: +SKIP
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pgen.capability import Offer
from pgen.errors import OptionError
from pgen.fitting import make_backend
from pgen.protocols import Backend
from pgen.run import Run
from pgen.testing import checks_contract as contract
from pgen.testing import checks_hygiene as hygiene
from pgen.testing import checks_shapes as shapes
from pgen.testing import checks_truth as truth
from pgen.testing.problems import DENOISED, ENERGIES, LEARNED, SUITED, UNSUITABLE, Reference
from pgen.testing.subject import NotApplicable, Settings, Subject

Check = Callable[[Subject], None]
Outcome = Literal["passed", "failed", "not applicable", "expected failure", "unexpected pass"]

_ASKED_FOR = (*DENOISED, *ENERGIES)
_KNOWN = (*SUITED, *_ASKED_FOR)
_SERVED = (*_KNOWN, *LEARNED)
_ALL = (*_SERVED, *UNSUITABLE)

#: every check, and the problems that it looks at (none: it looks at the backend alone)
CHECKS: dict[Check, tuple[Reference, ...]] = {
    contract.is_a_frozen_dataclass: (),
    contract.serves_something: (),
    contract.says_what_it_offers_or_lacks: _ALL,
    contract.examines_without_a_trace: _ALL,
    contract.refuses_what_it_cannot_serve: UNSUITABLE,
    contract.fits_and_answers: _SERVED,
    contract.fits_in_no_steps: _SERVED,
    contract.answers_only_what_it_offered: _SERVED,
    hygiene.leaves_global_state_alone: _SERVED,
    hygiene.leaves_inputs_alone: _SERVED,
    hygiene.is_repeatable: _SERVED,
    hygiene.minds_the_seed: _SERVED,
    hygiene.survives_saving: _SERVED,
    shapes.shapes_of_draws: _SERVED,
    shapes.shapes_of_log_prob: _SERVED,
    shapes.shapes_of_marginals: _KNOWN,
    shapes.answers_are_finite: _SERVED,
    shapes.keeps_double_precision: _SERVED,
    shapes.rows_do_not_mix: _KNOWN,
    truth.log_prob_is_true: _KNOWN,
    truth.exact_log_prob_has_no_noise: _SERVED,
    truth.posterior_is_true: _KNOWN,
    truth.marginals_are_true: _KNOWN,
    truth.samples_are_true: _SERVED,
    truth.learns: LEARNED,
}


def conformance(
    backend: Backend | type[Backend] | str,
    *,
    expected_failures: Mapping[str, str] | None = None,
    run: Run | None = None,
    problems: Collection[str] | None = None,
    tolerance: float = 0.25,
    alpha: float = 1e-6,
) -> Callable[[Any], None]:
    """A parametrised pytest test: one item for each check on each problem.

    Args:
        backend: a backend, a class (made with its defaults), or the name of an installed one.
        expected_failures: reasons by `"check[problem]"`, or `"check"` for all its problems. These tests are
            expected to fail, and fail the suite where they pass (a strict xfail).
        run: how the backend is fitted where its answers are compared with the truth; if None, in 400 steps.
        problems: names of the problems to look at; if None, all but `DENOISED` and `ENERGIES`, whose densities are no
            backend's own.
        tolerance: error of what is offered as an estimate that passes, in posterior standard deviations.
        alpha: probability that a check of random numbers fails although the backend is right.

    Raises:
        OptionError: `expected_failures` names a check or problem that does not exist.

    Example:
        >>> test_it = conformance("exact", expected_failures={"learns": "not yet"})  # doctest: +SKIP
    """
    import pytest

    names = _names(problems)
    trials = _Trials(backend, names, run, tolerance, alpha)
    reasons = _expected(expected_failures or {}, names)

    @pytest.mark.parametrize("trial", [_parameter(pytest, name, reasons) for name in names])
    def test_conformance(trial: str) -> None:
        try:
            trials.attempt(trial)
        except NotApplicable as skipped:
            pytest.skip(str(skipped))

    return test_conformance


def conformance_report(
    backend: Backend | type[Backend] | str,
    *,
    expected_failures: Mapping[str, str] | None = None,
    run: Run | None = None,
    problems: Collection[str] | None = None,
    tolerance: float = 0.25,
    alpha: float = 1e-6,
    progress: Callable[[ReportRow], None] | None = None,
) -> Report:
    """The same checks, run here and now, without pytest; arguments as for `conformance`.

    Args:
        backend: a backend, a class, or the name of an installed one.
        expected_failures: reasons by `"check[problem]"` or `"check"`.
        run: how the backend is fitted; if None, in 400 steps.
        problems: names of the problems to look at; if None, all but `DENOISED` and `ENERGIES`, whose densities are no
            backend's own.
        tolerance: error of an estimate that passes, in posterior standard deviations.
        alpha: probability of a false alarm of each check.
        progress: called with every row as it comes.
    """
    names = _names(problems)
    trials = _Trials(backend, names, run, tolerance, alpha)
    reasons = _expected(expected_failures or {}, names)
    rows = []
    for name in names:
        rows.append(_row(trials, name, reasons.get(name)))
        if progress is not None:
            progress(rows[-1])
    return Report(trials.backend.name, tuple(rows))


@dataclass(frozen=True)
class ReportRow:
    """One check on one problem: what came of it, and why."""

    check: str
    problem: str | None
    outcome: Outcome
    message: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """As in `expected_failures`: `check[problem]`."""
        return _name(self.check, self.problem)


@dataclass(frozen=True)
class Report:
    """What came of every check: prints as a table, iterates as rows, and says how many checks there were."""

    backend: str
    rows: tuple[ReportRow, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and nothing passed that was expected to fail."""
        return not self.failures

    @property
    def failures(self) -> tuple[ReportRow, ...]:
        """The rows that failed, or passed against expectation."""
        return tuple(r for r in self.rows if r.outcome in ("failed", "unexpected pass"))

    @property
    def counts(self) -> Mapping[str, int]:
        """How many rows have each outcome."""
        return Counter(r.outcome for r in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many checks ran, and what came of them."""
        ran = sum(r.outcome != "not applicable" for r in self.rows)
        counts = ", ".join(
            f"{count} {outcome}"
            for outcome, count in sorted(self.counts.items())
            if outcome != "not applicable"
        )
        idle = self.counts.get("not applicable", 0)
        seconds = sum(r.seconds for r in self.rows)
        ended = f"({counts or 'none'}), {idle} were not applicable; {seconds:.1f} s"
        return f"{self.backend}: {ran} checks ran {ended}"

    def __iter__(self) -> Iterator[ReportRow]:
        """The rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many checks there were, applicable or not."""
        return len(self.rows)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """A line for each check, then what failed, and why."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("check", "on", "passed", "failed", "expected", "idle", caption=self.summary)
        for check in dict.fromkeys(r.check for r in self.rows):
            mine = [r for r in self.rows if r.check == check]
            count = Counter(r.outcome for r in mine)
            failed = [r.problem or "it" for r in mine if r in self.failures]
            table.add_row(
                check,
                str(len(mine)),
                f"[green]{count['passed']}[/]" if count["passed"] else "-",
                f"[red]{', '.join(failed)}[/]" if failed else "-",
                str(count["expected failure"] or "-"),
                str(count["not applicable"] or "-"),
            )
        yield table
        for row in self.failures:
            yield escape(f"{row.outcome}: {row.name}\n    {row.message}\n")

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, no_color=True)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """The summary."""
        return f"Report({self.summary})"


class _Trials:
    """The backend under trial, with one subject for each problem, made when first needed."""

    def __init__(
        self,
        backend: Backend | type[Backend] | str,
        names: Collection[str],
        run: Run | None,
        tolerance: float,
        alpha: float,
    ) -> None:
        self.backend: Backend = (
            make_backend(backend)
            if isinstance(backend, str)
            else (backend() if isinstance(backend, type) else backend)
        )
        self.settings = Settings(_run(run), alpha, tolerance)
        self._subjects: dict[str, Subject] = {}
        asked = {id(reference) for _, reference in map(_BY_NAME.__getitem__, names)}
        self._served = [p for p in _SERVED if id(p) in asked]

    def subject(self, reference: Reference) -> Subject:
        if reference.name not in self._subjects:
            self._subjects[reference.name] = Subject(self.backend, reference, self.settings)
        return self._subjects[reference.name]

    def attempt(self, name: str) -> None:
        """Run one check: it raises AssertionError if it fails, NotApplicable if it has nothing to look at."""
        check, reference = _BY_NAME[name]
        if check is contract.serves_something:
            if not any(isinstance(self.subject(p).answer, Offer) for p in self._served):
                reasons = "\n".join(f"  {p.name}: {self.subject(p).answer.why}" for p in self._served)
                raise AssertionError(
                    f"every problem is refused, so that nothing could be checked:\n{reasons}"
                )
            return
        check(self.subject(reference or SUITED[0]))


def _run(run: Run | None) -> Run:
    """Enough for small problems; a learning rate that falls to nothing leaves no jitter behind."""
    if run is None:
        return Run(steps=400, lr=0.03, schedule="cosine", progress=False)
    return replace(run, steps=400 if run.steps is None else run.steps, progress=False)


def _name(check: str, problem: str | None) -> str:
    return check if problem is None else f"{check}[{problem}]"


_BY_NAME: dict[str, tuple[Check, Reference | None]] = {
    _name(check.__name__, None if reference is None else reference.name): (check, reference)
    for check, references in CHECKS.items()
    for reference in (references or (None,))
}


def _names(problems: Collection[str] | None) -> list[str]:
    """Names of the checks on some problems."""
    known = [p.name for p in _ALL]
    usual = [p.name for p in _ALL if p not in _ASKED_FOR]
    for problem in problems or ():
        if problem not in known:
            raise OptionError(f"problems names {problem!r}; there are {', '.join(known)}")
    return [
        name
        for name, (_, reference) in _BY_NAME.items()
        if reference is None or reference.name in (usual if problems is None else problems)
    ]


def _expected(reasons: Mapping[str, str], among: Collection[str]) -> dict[str, str]:
    """Reasons by full name; a bare check stands for all its problems."""
    found = {}
    for key, reason in reasons.items():
        names = [name for name in among if name == key or name.startswith(f"{key}[")]
        if not names and not any(name == key or name.startswith(f"{key}[") for name in _BY_NAME):
            raise OptionError(
                f"expected_failures names {key!r}, which is no check; there are "
                f"{', '.join(c.__name__ for c in CHECKS)}, "
                f"each alone or with a problem, as in 'log_prob_is_true[{SUITED[0].name}]' "
                f"({', '.join(p.name for p in _ALL)})"
            )
        found.update(dict.fromkeys(names, reason))
    return found


def _parameter(pytest: Any, name: str, reasons: Mapping[str, str]) -> Any:
    marks = [pytest.mark.xfail(reason=reasons[name], strict=True)] if name in reasons else []
    return pytest.param(name, id=name, marks=marks)


def _row(trials: _Trials, name: str, reason: str | None) -> ReportRow:
    check, reference = _BY_NAME[name]
    start = time.perf_counter()
    outcome: Outcome = "passed"
    message = ""
    try:
        trials.attempt(name)
        if reason is not None:
            outcome, message = (
                "unexpected pass",
                f"expected to fail ({reason}), and passed: take it out of expected_failures",
            )
    except NotApplicable as skipped:
        outcome, message = "not applicable", str(skipped)
    except AssertionError as error:
        outcome, message = (
            ("failed", str(error)) if reason is None else ("expected failure", f"{reason}: {error}")
        )
    except Exception as error:
        outcome, message = (
            ("failed" if reason is None else "expected failure"),
            f"{type(error).__name__}: {error}",
        )
    return ReportRow(
        check.__name__,
        None if reference is None else reference.name,
        outcome,
        message,
        time.perf_counter() - start,
    )
