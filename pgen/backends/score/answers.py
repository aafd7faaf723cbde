"""Queries on a program whose diffusions are learned: by reverse equations, probability flows and posteriors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pgen.algorithms.progress import followed
from pgen.backends.score.inference import LEVELS, Inference
from pgen.backends.score.joint import Guided
from pgen.backends.score.needs import most_exact
from pgen.backends.score.posterior import infer
from pgen.backends.score.prior import counted, denoising_law
from pgen.backends.score.rows import Row, by_row
from pgen.capability import Capability, Estimate, Exactness
from pgen.conversion import Converted, exactness_of, inside
from pgen.distributions.denoiser_conversions import Drawing, reversed_by
from pgen.distributions.denoising import Bounded, Flowing
from pgen.draws import Draws
from pgen.errors import Refused, Unanswerable
from pgen.history import History
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.sampling import draw, observed_scalars, onward
from pgen.structure import Structure

_NUMBERS = 1 << 20  # in the values that are weighed together
_FEW = 4.0  # particles that count, at any level, below which users are warned
_FEW_PARTICLES = 512  # for an evidence, where nobody says how many
_RUNS = 4  # of the particles, for an evidence with an error


class FewParticles(UserWarning):
    """The particles of a posterior came to stand on a few of them, so that it may be wrong."""


class Denoised:
    """A program with denoisers.

    Args:
        problem: what was fitted.
        structure: its structure.
        parameters: the learned tensors.
        reversed: how sites with a denoiser are drawn.
        weighed: how they are weighed.
        inference: how they are inferred.
        guidance: strength of classifier-free guidance of draws.
        chosen: sites whose conversions the user has chosen.
        guided: the guide, where one was learned.
    """

    def __init__(
        self,
        problem: Problem,
        structure: Structure,
        parameters: Parameters,
        reversed: Drawing,
        weighed: Flowing | Bounded,
        inference: Inference,
        guidance: float,
        chosen: Collection[str],
        guided: Guided | None = None,
    ) -> None:
        self.problem = problem
        self.structure = structure
        self.parameters = parameters
        self.reversed = reversed
        self.weighed = weighed
        self.inference = inference
        self.guidance = guidance
        self.chosen = chosen
        self.guided = guided
        self.history = History()

    def tensors(self) -> Mapping[str, Tensor]:
        """The learned tensors."""
        return self.parameters.state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved tensors over."""
        self.parameters.load(tensors)

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Joint draws of every site, by running the program forward."""
        with self.parameters.installed():
            return draw(self._drawn(self.problem), self.structure, n)

    def posterior(self, problem: Problem, structure: Structure, n: int) -> Mapping[str, Tensor]:
        """Joint draws of every unobserved site.

        Warns:
            FewParticles: nearly all particles of a row were lost on the way.
        """
        values: dict[str, Tensor] = {}
        with self.parameters.installed(), torch.no_grad():
            guided = self._guide(structure) if structure.evidenced else None
            if guided is not None:
                values |= guided.draws(_bare(problem, structure), structure, n)
            elif structure.evidenced:
                bare, how = self._inferred(problem, structure)
                found = infer(bare, structure, n, how)
                _warn_of_few(found.effective)
                values |= found.values
            left = [s for s in structure.latents if s not in values]
            if left:
                values |= onward(self._drawn(problem), structure, n, values, left)
        return Draws(values)

    def log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        """Log probability of the observed values; where latents bear upon them, by particles, from noise to data."""
        with self.parameters.installed(), torch.no_grad():
            parts = [self._direct(some, structure) for some in _slices(problem, structure)]
            total = Row.joined(parts)
            if structure.evidenced and self.guided is not None and self.guided.serves(structure):
                total = total.plus(self.guided.bound(_bare(problem, structure), structure))
            elif structure.evidenced:
                total = total.plus(self._marginal(problem, structure))
        most = Exactness.LOWER_BOUND if self.guided else most_exact(isinstance(self.weighed, Flowing))
        return Estimate(
            total.value,
            Exactness.UNNORMALIZED if structure.factors else min(total.kind, most, key=lambda e: e.strength),
            stderr=total.stderr,
            measure=structure.measure,
            dims=observed_scalars(problem, structure, together=structure.tied),
            evaluations=total.evaluations,
            solver_error=total.solver_error,
        )

    def _direct(self, problem: Problem, structure: Structure) -> Row:
        """What does not depend on a latent, for some rows."""
        bearing = structure.evidenced
        own = [
            s
            for s in (*structure.observed, *structure.factors)
            if not any(p in bearing for p in structure.sites[s].parents)
        ]
        denoised = {s for s in own if Capability.DENOISER in structure.sites[s].capabilities} - set(
            self.chosen
        )
        with validating(False):
            trace: Any = poutine.trace(problem).get_trace()
            trace.compute_log_prob(lambda name, _: name in own and name not in denoised)
        total = Row.none(structure, problem)
        for name in own:
            node = trace.nodes[name]
            if name not in denoised:
                path = (
                    structure.conversions.path(structure.sites[name].capabilities, Capability.LOG_PROB) or ()
                )
                part = Row(by_row(structure, name, node["log_prob"]), kind=exactness_of(path))
            else:
                part = self._denoised(structure, name, node)
            total = total.plus(part)
        return total

    def _denoised(self, structure: Structure, name: str, node: Any) -> Row:
        found = self.weighed.log_prob(denoising_law(node["fn"]), node["value"])

        def rows(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            value = counted(node["fn"], value)
            return by_row(structure, name, scale_and_mask(value, node["scale"], node["mask"]))

        kind = Exactness.LOWER_BOUND if isinstance(self.weighed, Bounded) else Exactness.ESTIMATE
        stderr = None if found.stderr is None else rows(found.stderr.square())
        value: Any = rows(found.value)
        return Row(
            value,
            None if stderr is None else stderr.sqrt(),
            rows(found.solver_error),
            found.evaluations,
            kind,
        )

    def _guide(self, structure: Structure) -> Guided | None:
        """The guide, if the posterior asked for is the guide's.

        Raises:
            Unanswerable: it should be, and there is none that draws these latents.
        """
        kind, guided = self.inference.kind, self.guided
        able = guided is not None and guided.serves(structure)
        if kind == "guide" and not able:
            drawn = "none was learned" if guided is None else f"the one here draws {', '.join(guided.drawn)}"
            raise Unanswerable(
                f"posterior='guide': latents {', '.join(sorted(structure.evidenced))} of {structure.name} have no guide "
                f"({drawn}); another kind infers them along noise levels: pgen.backend('score', posterior='tds')"
            )
        return guided if able and kind in ("auto", "guide") else None

    def _marginal(self, problem: Problem, structure: Structure) -> Row:
        """What depends on latents, integrated over them."""
        bare = _bare(problem, structure)
        if self.inference.kind in ("auto", "exact"):
            known = self._known(bare, structure)
            if known is not None:
                return known
        steps = self.inference.levels or LEVELS
        particles = self.inference.particles or _FEW_PARTICLES
        how = replace(self.inference, kind="tds", moves=0, particles=particles, adapt=False)
        logs, coarse = (
            torch.stack([_evidence(bare, structure, replace(how, levels=n)) for _ in range(_RUNS)])
            for n in (steps, max(2, steps // 2))
        )
        (fine, fine_error), (rough, rough_error) = map(_pooled, (logs, coarse))
        # Particles follow the prior as their steps have it, off by an error of first order in the width of these.
        stderr = (4 * fine_error.square() + rough_error.square()).sqrt()
        spent = 3 * _RUNS * steps * particles // 2
        return Row(2 * fine - rough, stderr, (fine - rough).abs(), spent)

    def _known(self, problem: Problem, structure: Structure) -> Row | None:
        """The same, without error, where the denoiser knows its posterior."""
        try:
            log = _evidence(problem, structure, replace(self.inference, kind="exact"))
        except Refused:
            if self.inference.kind == "exact":
                raise
            return None
        return Row(log, torch.zeros_like(log), torch.zeros_like(log), 0)

    def _inferred(self, problem: Problem, structure: Structure) -> tuple[Problem, Inference]:
        """What latents are inferred in, and how: a condition counts as in draws."""
        bare = _bare(problem, structure)
        if self.guidance == 1.0:
            return bare, self.inference

        def adapted(fn: Any) -> Any:
            return fn if getattr(fn, "context", None) is None else fn.guided(self.guidance)

        able = [
            s.name for s in structure if Capability.DENOISER in s.capabilities and s.name not in self.chosen
        ]
        guided = {s: partial(inside, change=adapted) for s in able}
        # Guided scores are those of no law; moves along them would lead to another one than guided draws have.
        return replace(bare, adapters={**bare.adapters, **guided}), replace(self.inference, moves=0)

    def _drawn(self, problem: Problem) -> Problem:
        """The problem, its denoisers drawn from as the options say."""
        conversion = reversed_by(self.reversed)

        def adapted(fn: Any) -> Any:
            law = fn.base if isinstance(fn, Converted) else fn
            if self.guidance != 1.0 and getattr(law, "context", None) is not None:
                law = law.guided(self.guidance)
            return Converted(law, (conversion,))

        own = [s.name for s in self.structure if Capability.DENOISER in s.capabilities]
        adapters = {s: partial(inside, change=adapted) for s in own if s not in self.chosen}
        return replace(problem, adapters={**problem.adapters, **adapters})


def _slices(problem: Problem, structure: Structure) -> Iterator[Problem]:
    """The problem, as many rows at a time as memory allows."""
    if problem.rows is None or structure.tied:
        yield problem
        return
    each = max(1, _NUMBERS // max(1, observed_scalars(problem, structure)))
    for start in followed(range(0, problem.rows, each), "integrating along paths"):
        yield problem.take(torch.arange(start, min(problem.rows, start + each)))


def _bare(problem: Problem, structure: Structure) -> Problem:
    """The problem with its denoisers as they are."""
    able = [s.name for s in structure if Capability.DENOISER in s.capabilities]
    return replace(problem, adapters={k: v for k, v in problem.adapters.items() if k not in able})


def _evidence(problem: Problem, structure: Structure, how: Inference) -> Tensor:
    """Log evidence of every row, `[rows]`."""
    found: Any = infer(problem, structure, 1, how).log_evidence
    return found


def _pooled(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean of what these are the logs of, `[runs, rows]`, and its standard error."""
    mean = logs.logsumexp(0) - math.log(len(logs))
    return mean, (logs - mean).exp().std(0) / math.sqrt(len(logs))


def _warn_of_few(effective: Tensor | None) -> None:
    if effective is None:
        return
    few = (effective < _FEW).nonzero()[:, 0].tolist()
    if few:
        rows = ", ".join(map(str, few[:5])) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        warnings.warn(
            f"of the particles of row {rows}, no more than {float(effective.min()):.1f} counted at some noise level: these "
            "posteriors rest on a few ancestors and may be wrong; use more levels or particles: "
            "pgen.backend('score', levels=3200, particles=16384)",
            FewParticles,
            stacklevel=4,
        )
