"""Queries on a fitted program and guide."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from pgen.algorithms import psis
from pgen.algorithms.bounds import log_evidence
from pgen.algorithms.estimators import local_cost
from pgen.backends.variational.draws import drawn, marginals, pick, row_axis, rows_at_once, sizes, whole
from pgen.backends.variational.joint import PARTICLES, Coupling
from pgen.capability import Estimate, Exactness
from pgen.choice import weakest
from pgen.draws import Draws
from pgen.errors import DataError, Unanswerable
from pgen.guides import Amortized, Automatic
from pgen.guides.proposal import Proposal, prior
from pgen.guides.transport import Transport
from pgen.history import History
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.sampling import draw, observed_scalars
from pgen.structure import Structure

_PROPOSALS = 500  # at least so many draws per row where they are resampled


class OtherDataWarning(UserWarning):
    """The posterior of some latents is that of the fitted data, although other data are asked about."""


class Posterior:
    """The learned tensors of a program and its guide, and the queries they answer.

    A guide of latents that all rows share reads no data (but under `objective="forward-kl"`): asked about other
    data than the fitted ones, their posterior stays as it is, and the latents of new rows are given that. An
    `OtherDataWarning` says so.
    """

    def __init__(
        self,
        parameters: Parameters,
        coupling: Coupling,
        proposal: Proposal,
        problem: Problem,
        evaluate: str,
        particles: int,
        correction: str,
        inexact: Sequence[Exactness] = (),
    ) -> None:
        """Keep what a fit settled; no log probability is more exact than any of `inexact`, whatever the latents."""
        self.parameters, self.coupling, self.proposal, self.problem = parameters, coupling, proposal, problem
        self.evaluate, self.particles, self.correction = evaluate, particles, correction
        self.inexact = inexact
        self.history = History()

    def tensors(self) -> Mapping[str, Tensor]:
        """The learned tensors of program and guide."""
        return self.parameters.state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved tensors over."""
        self.parameters.load(tensors)

    # --- sample -------------------------------------------------------------------------------------------

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Every site, drawn as the program with its learned tensors draws it."""
        with self._ready():
            return draw(self.problem, self.coupling.structure, n)

    # --- log_prob -------------------------------------------------------------------------------------------

    def log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        """A bound on or estimate of the log evidence, of each row, or of all if a latent ties them."""
        tied = not structure.data_plates or any(not structure.local(s) for s in structure.latents)
        with self._ready():
            coupling = self._asked(problem, structure)
            batches = [whole(problem)] if tied else self._batches(problem, structure)
            log_w = torch.cat([self._log_weights(coupling, batch, tied) for batch in batches], 1)
        scalars = observed_scalars(problem, structure, together=tied)
        common = {"measure": structure.measure, "dims": scalars or None}
        kinds = [Exactness.UNNORMALIZED] if structure.factors else list(self.inexact)
        if not self.coupling.order:
            return Estimate(log_w[0], weakest(kinds), **common)
        if self.evaluate == "bound":
            stderr = log_w.std(0) / log_w.shape[0] ** 0.5
            kind = weakest([Exactness.LOWER_BOUND, *kinds])
            return Estimate(log_w.mean(0), kind, stderr=stderr, particles=self.particles, **common)
        found, kind = log_evidence(log_w), weakest([Exactness.ESTIMATE, *kinds])
        khat = psis.psis(log_w).khat
        return Estimate(found.value, kind, stderr=found.stderr, khat=khat, particles=self.particles, **common)

    def _log_weights(self, coupling: Coupling, batch: Problem, tied: bool) -> Tensor:
        """Log weights `[particles, rows]`, `[particles, 1]` where the rows are tied.

        Divergences are sampled here even where they are known in closed form: beside a good guide the two
        halves of a weight vary together, and under the exact posterior it does not vary at all.
        """
        dims = (PARTICLES,) if tied or coupling.rows is None else (PARTICLES, coupling.rows)
        chunks = []
        count = self.particles if self.coupling.order else 1
        for size in sizes(count, batch.rows or 1, coupling.structure):
            lanes = coupling.weigh(batch, size)
            guide = coupling.guide_terms([lane.guide for lane in lanes])
            terms = [*coupling.program_terms(lanes).values(), *(term * -1.0 for term in guide.values())]
            total = local_cost(terms, dims)
            chunks.append(
                total.reshape(-1, 1).expand(size, 1)
                if len(dims) == 1
                else total.expand(size, batch.rows or 1)
            )
        return torch.cat(chunks)

    # --- posterior ----------------------------------------------------------------------------------------

    def posterior(self, problem: Problem, structure: Structure, n: int) -> Draws:
        """Draws from the guide, resampled if so asked; what was summed out is drawn exactly.

        Warns:
            OtherDataWarning: latents that all rows share are drawn as the fitted data have them.
        """
        with self._ready():
            coupling = self._asked(problem, structure)
            self._warn_of_others("posterior", coupling, problem)
            if self.correction == "importance" and coupling.order:
                return self._corrected(coupling, problem, structure, n)
            return Draws(drawn(coupling, problem, n, structure.latents))

    def _corrected(self, coupling: Coupling, problem: Problem, structure: Structure, n: int) -> Draws:
        """Proposals, resampled row by row where all latents are local, else all rows together."""
        weights: list[Tensor] = []
        values = drawn(coupling, problem, max(n, _PROPOSALS), structure.latents, weights)
        smoothed = psis.psis(torch.cat(weights))
        by_row = smoothed.log_weights.dim() == 2
        shares = smoothed.log_weights.exp().movedim(0, -1)
        index = torch.multinomial(shares, n, replacement=True).movedim(-1, 0)
        out = {s: pick(v, index, row_axis(v, structure, s) if by_row else None) for s, v in values.items()}
        bad = smoothed.khat > 0.7
        if bool(bad.any()):
            of = f"{int(bad.sum())} of {bad.numel()} rows" if by_row else "this data set"
            warnings.warn(
                f"posterior: k-hat is above 0.7 for {of} (up to {float(smoothed.khat.max()):.2f}), so that "
                "the importance weights there cannot be trusted; train longer, use a richer guide, or sample "
                "by another backend",
                UserWarning,
                stacklevel=2,
            )
        return Draws(out, log_weights=smoothed.log_weights.gather(0, index), khat=smoothed.khat)

    def transport(self) -> Transport:
        """The guide as a map from standard normal vectors to unconstrained latents.

        Raises:
            Unanswerable: the guide is no such map.
        """
        guide = self.proposal.owner
        if not isinstance(guide, Automatic):
            kind = "made from the program" if isinstance(guide, Amortized) else "your own"
            raise Unanswerable(
                f"{self.coupling.structure.name}: the guide is {kind if self.coupling.order else 'empty'}, and no map from one normal vector to the latents "
                "is known of it; fit with guide='flow' (or 'full-rank', 'low-rank', 'mean-field'), which are such maps"
            )
        with self._ready():
            return guide.transport()

    # --- marginals ----------------------------------------------------------------------------------------

    def marginals(self, problem: Problem, structure: Structure) -> Mapping[str, Any]:
        """The guide's law of each latent; averaged over draws of the latents that it depends on, if any.

        What was summed out has its exact law, averaged over draws of the guide's latents; what bears on
        nothing observed has an empirical one.

        Warns:
            OtherDataWarning: latents that all rows share have the law that the fitted data gave them.
        """
        with self._ready():
            coupling = self._asked(problem, structure)
            self._warn_of_others("marginals", coupling, problem)
            return marginals(coupling, problem, structure)

    # --- what a query is about ----------------------------------------------------------------------------

    def _warn_of_others(self, query: str, coupling: Coupling, problem: Problem) -> None:
        """Say which latents do not depend on the data asked about, unless those are the fitted data."""
        kept = [name for name in coupling.order if name in self.proposal.deaf]
        if kept and not _same_data(problem, self.problem):
            names = ", ".join(map(repr, kept[:4])) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
            warnings.warn(
                f"{query}: the guide of {names} reads no data, so that what is given for {names} is the posterior under "
                "the data fitted to, not those asked about; other latents are given it. For the posterior "
                "under these data fit again on them, or fit with objective='forward-kl', whose guide reads any",
                OtherDataWarning,
                stacklevel=4,
            )

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with self.parameters.installed(training=False), validating(False):
            yield

    def _batches(self, problem: Problem, structure: Structure) -> Iterator[Problem]:
        """As many rows at a time as may run side by side; all at once if the guide is of fixed size."""
        if problem.rows is None or self.proposal.fixed:
            yield whole(problem)
            return
        for index in torch.arange(problem.rows).split(rows_at_once(self.particles, structure)):
            yield problem.take(index)

    def _asked(self, problem: Problem, structure: Structure) -> Coupling:
        """Guide and program for the data asked about, which may observe other sites than the fit did."""
        coupling = self.coupling
        if not coupling.structure.observed and coupling.order:
            own = prior(structure)
            order, graph = own.order, own.graph
        else:
            order, graph = coupling.order, coupling.graph
        latents = set(structure.latents)
        held = tuple(n for n in order if n in latents or n not in structure.sites)
        given = tuple(n for n in order if n not in held)
        free = [n for n in structure.latents if n not in held]
        barren = _barren(structure, {*held, *structure.observed, *structure.factors}, free)
        summed = tuple(
            n for n in free if n not in barren or (structure.sites[n].enumerable and n in coupling.summed)
        )
        barren = tuple(n for n in barren if n not in summed)
        lost = [n for n in summed if not structure.sites[n].enumerable]
        if lost:
            raise Unanswerable(
                f"{structure.name}: {lost[0]!r} is not observed in this data, the guide does not draw it, "
                f"and it cannot be summed out; observe it, or fit with data that leave it out. The guide "
                f"draws {', '.join(order) or 'nothing'}"
            )
        asked = replace(
            coupling,
            structure=structure,
            order=held,
            graph=graph,
            given=given,
            summed=summed,
            barren=barren,
            row_plates=coupling.row_plates | frozenset(structure.data_plates),
            nesting=max(coupling.nesting, structure.nesting),
        )
        if self.proposal.fixed and problem.rows != self.problem.rows:
            raise DataError(
                f"the guide has a law of its own for each of the {self.problem.rows} rows it was fitted to, "
                f"and this data has {problem.rows or 'no'} rows; use guide='amortized', which serves any rows"
            )
        return asked


def _same_data(one: Problem, other: Problem) -> bool:
    if one is other or (one.source is not None and one.source is other.source):
        return True
    pairs = [(one.inputs, other.inputs), (one.observations, other.observations)]
    return one.rows == other.rows and all(
        a.keys() == b.keys() and all(_same(value, b[name]) for name, value in a.items()) for a, b in pairs
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    b = b.to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())  # what is missing in both is the same


def _barren(structure: Structure, bearing: set[str], free: Sequence[str]) -> tuple[str, ...]:
    """Latents from which no path leads to anything that matters."""
    alive = set(bearing)
    for name in bearing & set(structure.graph):
        alive |= nx.ancestors(structure.graph, name)
    return tuple(n for n in free if n not in alive)
