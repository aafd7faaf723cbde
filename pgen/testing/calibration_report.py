"""What simulations say of a posterior: is every quantity calibrated, and if not, how is it off; coverage of intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pgen.errors import OptionError
from pgen.metrics.beta import beta_quantile
from pgen.tables import as_text
from pgen.testing.calibration_bands import band, cuts_of, holm, uniformity
from pgen.testing.calibration_worlds import JOINT, LIKELIHOOD

LEVELS = (0.5, 0.8, 0.9, 0.95)
_SHOWN = 40  # lines of a table at most: what failed comes first
_CLEAR = 3.0  # score of a direction that is named


@dataclass(frozen=True)
class CalibrationRow:
    """One scalar quantity: are the ranks of its true values uniform?

    Attributes:
        quantity: its name: `mu`, `w[0]`, `log likelihood`.
        p: p-value of uniform ranks.
        adjusted: the same, adjusted for the number of quantities (Holm); at most alpha fails.
        passed: whether nothing was found.
        verdict: what was found, in words.
        lean: standard score of the mean rank; positive where the draws are too low.
        width: standard score of the dispersion of the ranks; positive where the draws are too narrow.
        band: p-value of the rank ECDF alone.
        chi_square: p-value of the binned ranks alone.
    """

    quantity: str
    p: float
    adjusted: float
    passed: bool
    verdict: str
    lean: float
    width: float
    band: float
    chi_square: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of true values among posterior draws, over simulated data sets: prints as a table, iterates as rows.

    Attributes:
        program: name of the program.
        backend: name of the backend.
        quantities: names of the scalar quantities, Q of them.
        ranks: `[R, Q]`, whole numbers from 0 to `draws`; uniform where the posterior is right.
        draws: posterior draws that each rank is among, L.
        alpha: probability of a false alarm in the whole report.
        short: data sets whose draws were worth fewer than L / 2 independent ones, as far as they were continued.
        how: how each data set got its posterior.
    """

    program: str
    backend: str
    quantities: tuple[str, ...]
    ranks: Tensor
    draws: int
    alpha: float
    short: int = 0
    how: str = ""

    @functools.cached_property
    def rows(self) -> tuple[CalibrationRow, ...]:
        """One for each quantity, in program order."""
        found = uniformity(self.ranks, self.draws)
        adjusted = holm(found.p)
        rows = []
        for i, name in enumerate(self.quantities):
            passed = float(adjusted[i]) > self.alpha
            lean, width = float(found.lean[i]), float(found.width[i])
            row = CalibrationRow(
                quantity=name,
                p=float(found.p[i]),
                adjusted=float(adjusted[i]),
                passed=passed,
                verdict="uniform" if passed else _in_words(name, lean, width),
                lean=lean,
                width=width,
                band=float(found.band[i]),
                chi_square=float(found.chi_square[i]),
            )
            rows.append(row)
        return tuple(rows)

    @property
    def passed(self) -> bool:
        """Whether every quantity is calibrated, as far as these simulations tell."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[CalibrationRow, ...]:
        """The rows that failed, the worst first."""
        return tuple(sorted((r for r in self.rows if not r.passed), key=lambda r: r.p))

    def ecdf(self, quantity: str) -> Tensor:
        """Share of the ranks of a quantity below the places where `band` looks."""
        ranks = self.ranks[:, self.quantities.index(quantity)]
        return (ranks[None] < cuts_of(self.draws)[:, None]).double().mean(1)

    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places in (0, 1), and the lowest and highest ECDF that uniform ranks have there.

        The ECDF of any one of the quantities leaves this band anywhere with probability `alpha` over their number, at most.
        """
        return band(len(self.ranks), self.draws, self.alpha / len(self.quantities))

    def coverage(self, levels: Sequence[float] = LEVELS) -> Coverage:
        """How often central posterior intervals hold the truth, beside how often they should.

        An interval between two order statistics of L draws holds the truth with a probability that is a multiple of
        1 / (L + 1): the multiple nearest to each level is reported as nominal.

        Raises:
            OptionError: a level that these draws cannot have.
        """
        return Coverage.of(self, levels)

    @property
    def summary(self) -> str:
        """One line: what was done, and what came of it."""
        failed = len(self.failures)
        verdict = f"{failed} of {len(self.rows)} quantities are not calibrated" if failed else "calibrated"
        doubt = (
            f"; in {self.short} of them draws were worth less than half as many, which makes posteriors look too narrow"
            if self.short
            else ""
        )
        return (
            f"{self.backend} on {self.program}: {verdict}; {len(self.ranks)} data sets, {self.draws} draws each"
            f"{f' ({self.how})' if self.how else ''}{doubt}; a false alarm has probability {self.alpha:.2g}"
        )

    def __iter__(self) -> Iterator[CalibrationRow]:
        """The rows, in program order."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many quantities there are."""
        return len(self.rows)

    def __getitem__(self, quantity: str) -> CalibrationRow:
        """The row of that quantity."""
        return next(r for r in self.rows if r.quantity == quantity)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table: what failed, then the others."""
        table = Table("quantity", "ranks are", "p-value", "adjusted", "lean", "width", caption=self.summary)
        ordered = [*self.failures, *(r for r in self.rows if r.passed)]
        for r in ordered[:_SHOWN]:
            verdict = escape(r.verdict) if r.passed else f"[red]{escape(r.verdict)}[/]"
            scores = (f"{r.lean:+.1f}", f"{r.width:+.1f}")
            table.add_row(escape(r.quantity), verdict, f"{r.p:.2g}", f"{r.adjusted:.2g}", *scores)
        if len(ordered) > _SHOWN:
            rest = ordered[_SHOWN:]
            bad = sum(not r.passed for r in rest)
            table.add_row(f"and {len(rest)} more", f"{bad} not uniform" if bad else "uniform")
        yield table

    def __str__(self) -> str:
        """The table as plain text."""
        return as_text(self)

    def __repr__(self) -> str:
        """The summary."""
        return f"Calibration({self.summary})"


def _in_words(quantity: str, lean: float, width: float) -> str:
    """What ranks that are not uniform say of the posterior."""
    about_data = quantity in (LIKELIHOOD, JOINT)
    low, high = ("draws less probable than the truth", "draws more probable than the truth")
    bias = (low if lean > 0 else high) if about_data else f"posterior biased {'low' if lean > 0 else 'high'}"
    spread = f"posterior too {'narrow' if width > 0 else 'wide'}"
    found = sorted([(abs(lean), bias), (abs(width), spread)], reverse=True)
    named = [words for score, words in found if score > max(_CLEAR, found[0][0] / 2)]
    return " and ".join(named).replace(" and posterior", " and") or "irregular"


# --- coverage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoverageRow:
    """One quantity at one level: how often its central interval held the truth.

    Attributes:
        quantity: its name.
        level: as asked for.
        nominal: probability with which the interval between two of the draws should hold the truth.
        empirical: share of the data sets in which it did.
        low: lower end of the 95 % interval of that share (Clopper & Pearson, 1934).
        high: its upper end.
        p: p-value of the nominal coverage, two-sided.
        passed: whether nothing is wrong, all rows considered.
    """

    quantity: str
    level: float
    nominal: float
    empirical: float
    low: float
    high: float
    p: float
    passed: bool


@dataclass(frozen=True)
class Coverage:
    """Nominal and empirical coverage of central posterior intervals: prints as a table, iterates as rows.

    Attributes:
        rows: one for each quantity and level.
        caption: what was done.
    """

    rows: tuple[CoverageRow, ...]
    caption: str = ""

    @staticmethod
    def of(calibration: Calibration, levels: Sequence[float]) -> Coverage:
        """Read it off the ranks."""
        total, count = calibration.draws + 1, len(calibration.ranks)
        found = []
        for level in levels:
            outside = round(total * (1 - level) / 2) if 0 < level < 1 else 0
            if not 1 <= outside < total / 2:
                least = 1 - 2 * ((total - 1) // 2) / total
                raise OptionError(
                    f"levels holds {level!r}; central intervals of {calibration.draws} draws have levels from {least:.3g} to "
                    f"{1 - 2 / total:.3g}: take another level, or draws={max(9, round(2 / max(1e-4, 1 - level)))} or more"
                )
            inside = (calibration.ranks >= outside) & (calibration.ranks < total - outside)
            found.append((float(level), 1 - 2 * outside / total, inside.sum(0)))
        p = torch.stack([_binomial_p(hits, count, nominal) for _, nominal, hits in found])
        ends = [_binomial_interval(hits, count) for _, _, hits in found]
        rows = [
            CoverageRow(
                quantity=name,
                level=level,
                nominal=nominal,
                empirical=int(hits[q]) / count,
                low=float(ends[i][0][q]),
                high=float(ends[i][1][q]),
                p=float(p[i, q]),
                passed=float(p[i, q]) * p.numel() > calibration.alpha,
            )
            for q, name in enumerate(calibration.quantities)
            for i, (level, nominal, hits) in enumerate(found)
        ]
        return Coverage(tuple(rows), calibration.summary)

    @property
    def passed(self) -> bool:
        """Whether every interval holds the truth as often as it should, all rows considered."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[CoverageRow, ...]:
        """The rows that failed, the worst first."""
        return tuple(sorted((r for r in self.rows if not r.passed), key=lambda r: r.p))

    def __iter__(self) -> Iterator[CoverageRow]:
        """The rows, quantity by quantity."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """A line for each quantity, a column for each level."""
        levels = {row.level: row.nominal for row in self.rows}
        table = Table("quantity", *(f"{nominal:.3g}" for nominal in levels.values()), caption=self.caption)
        lines: dict[str, list[CoverageRow]] = {}
        for row in self.rows:
            lines.setdefault(row.quantity, []).append(row)
        ordered = sorted(lines.items(), key=lambda item: all(r.passed for r in item[1]))
        for name, line in ordered[:_SHOWN]:
            table.add_row(escape(name), *map(_cell, line))
        if len(ordered) > _SHOWN:
            table.add_row(f"and {len(ordered) - _SHOWN} more")
        yield table

    def __str__(self) -> str:
        """The table as plain text."""
        return as_text(self)

    def __repr__(self) -> str:
        """The table as plain text."""
        return str(self)


def _cell(row: CoverageRow) -> str:
    text = f"{row.empirical:.3f} ({row.low:.3f} to {row.high:.3f})"
    return text if row.passed else f"[red]{text} *[/]"


def _binomial_interval(hits: Tensor, count: int, error: float = 0.05) -> tuple[Tensor, Tensor]:
    """Clopper and Pearson's interval of a probability."""
    k = hits.double()
    half = torch.tensor(error / 2, dtype=torch.float64)
    low = beta_quantile(half, k.clamp_min(1), count - k + 1)
    high = beta_quantile(1 - half, k + 1, (count - k).clamp_min(1))
    return torch.where(hits == 0, 0.0, low), torch.where(hits == count, 1.0, high)


def _binomial_p(hits: Tensor, count: int, probability: float) -> Tensor:
    """Two-sided p-value of a probability: twice the lesser tail."""
    n = torch.arange(count + 1, dtype=torch.float64)
    choose = math.lgamma(count + 1) - torch.lgamma(n + 1) - torch.lgamma(count - n + 1)
    mass = (choose + n * math.log(probability) + (count - n) * math.log1p(-probability)).exp()
    lower, upper = mass.cumsum(0), mass.flip(0).cumsum(0).flip(0)
    return (2 * torch.minimum(lower[hits], upper[hits])).clamp_max(1.0)
