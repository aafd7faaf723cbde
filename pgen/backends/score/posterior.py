"""Posteriors of latents with denoisers: from what is observed to a guide, from noise to draws.

    linear and Gaussian    y = A x + e: guides that know the covariance of what is not yet known
    the same, and a denoiser that knows its posterior (a mixture): exact draws
    anything with a density    guides that differentiate the likelihood at the denoised value

By themselves guides are approximations (DPS, PiGDM, MMPS, DDRM); as twists of particles (TDS) they are corrected, up to
the number of particles; Metropolis moves at the end, whose ratio is a line integral of the score, correct what is left
within modes and make copies of a particle different again. They need scores at little noise, which only denoisers have
that are exact or nearly so: where scores at two levels disagree, there are no moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pgen.algorithms.progress import followed
from pgen.backends.score.conditional import MATRIX, Conditional, picks
from pgen.backends.score.evidence import Evidence, Linear
from pgen.backends.score.inference import ELEMENTS, LEVELS, LINEAR, PARTICLES, Inference, Inferred
from pgen.backends.score.prior import Prior
from pgen.capability import Capability, Refusal
from pgen.choice import refusal_text
from pgen.errors import Refused
from pgen.problem import Problem
from pgen.structure import Structure

_NUMBERS = 1 << 23
"""In the particles of the rows that are run together, at most."""
_FEWEST, _MOST = 512, 8192  # particles of a row, where nobody says how many
_WORK = 5e11  # operations that all particles may take, beyond the fewest
_ENOUGH = 100.0  # particles that count, at any level, below which there are more levels
_DENSE = 256  # levels where these and the most particles are affordable, and nobody says how many
_FINER, _FINEST = 4, 1600  # times as many, and at most so many
_BESIDE = 100.0  # operations for each number, beside those that are counted

Found = tuple[Tensor, Inferred]
"""Rows of the data, and draws for them."""
Axes = dict[str, int | None]
"""For each latent the axis of its draws along the rows."""


def infer(problem: Problem, structure: Structure, n: int, how: Inference) -> Inferred:
    """Draw the latents that the data bear upon, for every row of the data.

    Args:
        problem: the program with its data; its learned tensors are installed.
        structure: of the problem.
        n: draws.
        how: the algorithm.

    Raises:
        Refused: a latent has no denoiser, or the likelihood is not what the algorithm needs; names a site.
    """
    names = tuple(s for s in structure.latents if s in structure.evidenced)
    for name in names:
        if Capability.DENOISER not in structure.sites[name].capabilities:
            _refuse(
                structure,
                name,
                "a denoiser",
                f"{structure.sites[name].distribution} can only be drawn or weighed",
            )
        if getattr(structure.sites[name].support, "is_discrete", False):
            _refuse(
                structure, name, "real values", "whole numbers are not what is denoised, only seen through"
            )
        above = [p for p in structure.sites[name].parents if p in structure.latents]
        if above:
            _refuse(
                structure,
                name,
                "a law that no other latent changes",
                f"it depends on the latent {above[0]!r}",
            )
    seen = tuple(
        s
        for s in (*structure.observed, *structure.factors)
        if any(p in names for p in structure.sites[s].parents)
    )
    apart = bool(structure.data_plates) and all(map(structure.local, (*names, *seen)))
    asked = _Asked(problem, structure, names, seen, apart, n)
    rows = torch.arange((problem.rows or 1) if apart else 1)
    found, axes = asked.draws(rows, how)
    return _joined(found, axes)


@dataclass(frozen=True)
class _Asked:
    """What is to be drawn, and given what.

    Attributes:
        problem: the program with its data.
        structure: of the problem.
        names: the latents.
        seen: what is observed and depends on them.
        apart: whether the rows of the data are independent of each other.
        n: draws.
    """

    problem: Problem
    structure: Structure
    names: tuple[str, ...]
    seen: tuple[str, ...]
    apart: bool
    n: int

    def draws(self, rows: Tensor, how: Inference) -> tuple[list[Found], Axes]:
        """Draws of some rows, part by part, and which axes of the latents run along rows."""
        found: list[Found] = []
        axes: Axes = {}
        each = self._together(how)
        if how.levels is None and how.particles is None and how.kind in PARTICLES:
            dense = replace(how, levels=_DENSE)
            how = dense if self._affordable(len(rows), dense) >= _MOST else how
        chosen = how
        if how.particles is None and how.kind in PARTICLES:
            chosen = replace(how, particles=self._particles(len(rows), how))
        for index in followed(rows.split(each), "drawing given rows"):
            prior, evidence = self._given(index)
            axes = {b.name: None if b.axis is None else b.axis + 1 for b in prior.blocks}
            linear = evidence.linear()
            self._require(how, prior, linear)
            for some in _alike(linear, prior.rows):
                if len(some) == prior.rows:
                    part = Conditional(prior, evidence, linear, chosen)
                else:
                    part = Conditional(*self._given(index[some]), linear and linear.of(some), chosen)
                found += self._enough(index[some], part.draws(self.n), axes, how)
        return found, axes

    def _enough(self, rows: Tensor, part: Inferred, axes: Axes, how: Inference) -> list[Found]:
        """What was found, and where too many particles were lost, what is found on more levels."""
        levels = _FINER * (how.levels or LEVELS)
        finer = replace(how, levels=levels)
        if part.effective is None or not how.adapt or levels > _FINEST:
            return [(rows, part)]
        few = (part.effective < _ENOUGH).cpu()
        if not bool(few.any()) or self._affordable(int(few.sum()), finer) < _FEWEST:
            return [(rows, part)]
        again, _ = self.draws(rows[few], finer)
        return again if bool(few.all()) else [(rows[~few], part.of(~few, axes)), *again]

    def _given(self, rows: Tensor) -> tuple[Prior, Evidence]:
        problem = self.problem.take(rows) if self.apart else self.problem
        prior = Prior.of(problem, self.structure, self.names, self.apart)
        return prior, Evidence(problem, self.structure, prior, self.seen, self.apart)

    def _require(self, how: Inference, prior: Prior, linear: Linear | None) -> None:
        """That the algorithm can do with what is seen.

        Raises:
            Refused: it cannot.
        """
        site, kind = self.seen[0], how.kind
        if linear is None:
            if kind in LINEAR:
                why = f"the algorithm {kind!r} knows of observations that are linear in the latents, with normal noise of one size; this one is not"
                _refuse(self.structure, site, "a linear-Gaussian likelihood", why)
        elif kind in ELEMENTS and bool((picks(linear.matrix).sum(-1) > 1).any()):
            why = f"the algorithm {kind!r} puts in elements of the latents as they were seen; here several are seen in one number"
            _refuse(self.structure, site, "an observation of single elements", why)
        if kind == "exact" and prior.conjugate is None:
            why = (
                "posterior='exact' takes one latent, one event in each row, without a context, whose denoiser has a "
                "method `linear_posterior` (see pgen.algorithms.diffusion.posteriors.Conjugate), as MixtureDenoiser has"
            )
            _refuse(self.structure, self.names[0], "a denoiser that knows its posterior", why)

    def _together(self, how: Inference) -> int:
        """Rows of the data that memory allows at once."""
        prior, _ = self._given(torch.arange(1))
        return max(1, _NUMBERS // (prior.size * max(self.n, how.particles or _MOST)))

    def _particles(self, rows: int, how: Inference) -> int:
        """As many as are worth their work, a power of two: cheap denoisers get more."""
        most = _MOST / math.sqrt(max(1.0, (how.levels or LEVELS) / _DENSE))
        return 1 << int(math.log2(max(_FEWEST, min(most, self._affordable(rows, how)))))

    def _affordable(self, rows: int, how: Inference) -> float:
        """Particles of each row that make up the work allowed: counted, not timed, so that draws can be repeated."""
        return _WORK / (rows * (how.levels or LEVELS) * self._work)

    @cached_property
    def _work(self) -> float:
        """Operations for a particle at a noise level."""
        prior, evidence = self._given(torch.arange(1))
        linear = evidence.linear()
        products = 1  # with the Jacobian
        if linear is not None and linear.y.shape[-1] <= MATRIX:
            products = linear.y.shape[-1]
        x = prior.like.new_zeros(prior.rows * 2, prior.size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            prior.denoiser(x, x.new_ones(len(x)))
        return (counter.get_total_flops() / len(x) + _BESIDE * prior.size) * (1 + 2 * products)


def _refuse(structure: Structure, site: str, missing: str, why: str) -> None:
    refusal = Refusal(site, missing, why)
    raise Refused(f"the posterior of {structure.name}: {refusal_text(refusal)}", refusal)


def _alike(linear: Linear | None, rows: int) -> list[Tensor]:
    """Rows whose observations have one matrix; all of them where there is none."""
    left = torch.arange(rows)
    if linear is None:
        return [left]
    groups = []
    while len(left):
        first = linear.matrix[left[0]]
        far = (linear.matrix[left] - first).abs().flatten(1).amax(1) > 1e-5 * first.abs().amax()
        far = far.to(left.device)
        groups.append(left[~far])
        left = left[far]
    return groups


def _joined(found: Sequence[tuple[Tensor, Inferred]], axes: Mapping[str, int | None]) -> Inferred:
    """The rows of all parts, in their order."""
    order = torch.cat([rows for rows, _ in found]).argsort()
    values = {}
    for name, axis in axes.items():
        parts = [part.values[name] for _, part in found]
        values[name] = (
            parts[0] if axis is None else torch.cat(parts, axis).index_select(axis, order.to(parts[0].device))
        )

    def together(read: Any) -> Tensor | None:
        parts = [read(part) for _, part in found]
        return None if any(p is None for p in parts) else torch.cat(parts)[order.to(parts[0].device)]

    return Inferred(values, together(lambda p: p.log_evidence), together(lambda p: p.effective))
