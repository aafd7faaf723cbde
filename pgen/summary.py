"""A posterior in one table: each scalar with its error, its effective draws, R-hat; and in words what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from pgen.advice import ESS, R_HAT, Evidence, advise, coordinate
from pgen.errors import OptionError
from pgen.metrics.chains import Diagnosis, diagnose
from pgen.tables import as_text

if TYPE_CHECKING:
    from pgen.draws import Draws

_SHOWN = 40  # rows of a printed table, about


@dataclass(frozen=True)
class SummaryRow:
    """One scalar of one site.

    Attributes:
        name: such as `theta[3]`.
        site: such as `theta`.
        mean: of all draws.
        sd: standard deviation of all draws.
        quantiles: by probability.
        mcse_mean: Monte Carlo standard error of the mean.
        ess_bulk: effective draws for the middle of the distribution.
        ess_tail: effective draws for its tails.
        r_hat: above 1.01, chains disagree (up to chance).
    """

    name: str
    site: str
    mean: float
    sd: float
    quantiles: Mapping[float, float]
    mcse_mean: float
    ess_bulk: float
    ess_tail: float
    r_hat: float


@dataclass(frozen=True, eq=False)
class Summary:
    """Rows, one for each scalar of the unobserved sites: prints as a table, iterates as rows, `[name]` is one of them.

    Attributes:
        found: what was computed, tensors `[*event]` by site.
        probs: probabilities of the quantiles.
        chains: number of chains.
        draws: draws of each chain.
        left_out: draws that were left out so that chains are of one length.
        warnings: what is wrong, how badly, and what to try; empty where nothing is.
    """

    found: Mapping[str, Diagnosis]
    probs: tuple[float, ...]
    chains: int
    draws: int
    left_out: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[SummaryRow, ...]:
        """Every scalar, in the order of the program."""
        return tuple(r for site, f in self.found.items() for r in self._rows(site, range(f.mean.numel())))

    def __iter__(self) -> Iterator[SummaryRow]:
        """The rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many scalars there are."""
        return sum(f.mean.numel() for f in self.found.values())

    def __getitem__(self, name: str) -> SummaryRow:
        """The row of a scalar, such as `summary["theta[3]"]`.

        Raises:
            KeyError: there is none of that name.
        """
        for row in self._rows_of(name.partition("[")[0]) or self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; rows are called {', '.join(r.name for r in self.rows[:5])}, ...")

    def _rows_of(self, site: str) -> list[SummaryRow]:
        return self._rows(site, range(self.found[site].mean.numel())) if site in self.found else []

    def _rows(self, site: str, places: Sequence[int]) -> list[SummaryRow]:
        f = self.found[site]
        fields = torch.stack([f.mean, f.sd, f.mcse_mean, f.ess_bulk, f.ess_tail, f.r_hat])
        scalars = fields.reshape(6, f.mean.numel()).tolist()
        quantiles = f.quantiles.reshape(len(self.probs), f.mean.numel()).tolist()
        out = []
        for i in places:
            mean, sd, error, bulk, tail, r_hat = (v[i] for v in scalars)
            q = {p: v[i] for p, v in zip(self.probs, quantiles, strict=True)}
            out.append(
                SummaryRow(coordinate(site, i, f.mean.shape), site, mean, sd, q, error, bulk, tail, r_hat)
            )
        return out

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table, then the warnings."""
        table = Table(caption=_caption(self), caption_justify="left")
        heads = (
            "mean",
            "sd",
            *(f"{100 * p:g} %" for p in self.probs),
            "mcse",
            "ess bulk",
            "ess tail",
            "R-hat",
        )
        table.add_column("", no_wrap=True)
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        sites, places = _chosen(self.found)
        for site in sites:
            for row in self._rows(site, places[site]):
                table.add_row(escape(row.name), *_cells(row))
            left = self.found[site].mean.numel() - len(places[site])
            if left:
                table.add_row(f"[dim]{escape(site)}: {left:,} more, none worse[/dim]")
        if len(sites) < len(self.found):
            table.add_row(f"[dim]{len(self.found) - len(sites):,} more sites, none worse[/dim]")
        yield table
        for warning in self.warnings:
            yield f"[yellow]![/yellow] {escape(warning)}."

    def __str__(self) -> str:
        """The table as plain text."""
        return as_text(self)

    def __repr__(self) -> str:
        """The table as plain text."""
        return str(self)


def summarize(draws: Draws, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
    """Judge draws, coordinate by coordinate.

    Raises:
        OptionError: a probability is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in probs):
        raise OptionError(f"summary(probs={tuple(probs)}): expected probabilities, between 0 and 1")
    sites, stats = draws.by_chain(draws.sites), draws.by_chain(draws.stats)
    found = {site: _on_cpu(diagnose(x, tuple(probs))) for site, x in sites.items()}
    # Draws of a guide or of an exact posterior are independent: to them, chains mean nothing.
    scalars = {s: x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for s, x in sites.items()}
    evidence = Evidence(scalars, stats, found, markov=draws.chains > 1 or bool(stats), khat=draws.khat)
    chains, each = evidence.shape
    total = len(next(iter(draws.sites.values()))) if draws.sites else 0
    return Summary(found, tuple(probs), chains, each, total - chains * each, advise(evidence))


def _on_cpu(found: Diagnosis) -> Diagnosis:
    return Diagnosis(*(f.cpu() for f in found))


def _caption(summary: Summary) -> str:
    chains = "1 chain" if summary.chains == 1 else f"{summary.chains:,} chains"
    left = (
        "" if not summary.left_out else f" ({summary.left_out:,} left out, so that chains are of one length)"
    )
    return f"{chains} of {summary.draws:,} draws{left}"


def _chosen(found: Mapping[str, Diagnosis]) -> tuple[list[str], dict[str, list[int]]]:
    """Which sites, and which of their scalars, a table has room for: the worst, in the order of the program."""
    if sum(f.mean.numel() for f in found.values()) <= _SHOWN:
        return list(found), {s: list(range(f.mean.numel())) for s, f in found.items()}
    badness = {s: _badness(f) for s, f in found.items() if f.mean.numel()}
    worst = sorted(badness, key=lambda s: -float(badness[s].max()))[:_SHOWN]
    each = max(1, _SHOWN // (2 * len(worst)))
    # A site is cut only if that saves more than the line that says so.
    places = {
        s: sorted(
            badness[s].argsort(descending=True)[: each if len(badness[s]) > each + 1 else None].tolist()
        )
        for s in worst
    }
    return [s for s in found if s in places], places


def _badness(found: Diagnosis) -> torch.Tensor:
    """Greater for worse scalars: by R-hat in steps of a hundredth, then by the number of effective draws."""
    steps = ((found.r_hat - 1).clamp(0, 1e6) / 0.01).floor().nan_to_num(-1.0)
    least = torch.minimum(found.ess_bulk, found.ess_tail).nan_to_num(0.0)
    return (steps + 1 / (1 + least)).reshape(-1)


def _cells(row: SummaryRow) -> list[str]:
    digits = _digits(row.mcse_mean if row.mcse_mean > 0 else row.sd / 100)
    numbers = [_number(v, digits) for v in (row.mean, row.sd, *row.quantiles.values())]
    error = "-" if math.isnan(row.mcse_mean) else f"{row.mcse_mean:.1g}"
    effective = [
        _flagged(f"{v:,.0f}", v < ESS) if math.isfinite(v) else "-" for v in (row.ess_bulk, row.ess_tail)
    ]
    r_hat = "-" if math.isnan(row.r_hat) else _flagged(f"{row.r_hat:.3f}", row.r_hat > R_HAT)
    return [*numbers, error, *effective, r_hat]


def _flagged(text: str, bad: bool) -> str:
    return f"[red]{text}[/red]" if bad else text


def _digits(error: float) -> int | None:
    """Decimals that are worth printing for a number with this error; None where they are too many."""
    if not error > 0 or not math.isfinite(error):
        return None
    decimals = 1 - math.floor(math.log10(error))
    return max(0, decimals) if decimals <= 6 else None


def _number(value: float, digits: int | None) -> str:
    if digits is None or not math.isfinite(value) or abs(value) >= 1e7:
        return f"{value:.4g}"
    return f"{value:.{digits}f}"
