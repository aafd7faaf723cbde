"""Self-normalised importance sampling from the prior: a whole pgen backend in one small file.

Particles are drawn from the prior of the latent sites, z_k ~ p(z), and weighted by the likelihood of the
data, w_k = p(x | z_k). Then

    log p(x)  is estimated by  log (1/K) sum_k w_k        (its exponential is unbiased)
    p(z | x)  is estimated by  resampling z_k with probability w_k / sum_j w_j

References:
    Weighing and integrating evidence for stochastic simulation in Bayesian networks (Fung & Chang, UAI 1989).
    Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry, JMLR 25, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pgen
import torch
from pgen.algorithms.psis import psis
from pgen.sampling import draw, observed_scalars, particles, split, vectorizes
from pyro import poutine
from torch import Tensor


@dataclass(frozen=True)
class TemplateBackend:
    """Likelihood weighting: draws from the prior, weighted by the likelihood of the data.

    Attributes:
        particles: draws from the prior per question.
        via: conversions to go through, by site; empty lets pgen choose.
    """

    name: ClassVar[str] = "template"

    particles: int = 10_000
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse options that cannot be."""
        if self.particles < 2:
            raise pgen.errors.OptionError(f"particles={self.particles}; expected at least 2")

    def examine(self, structure: pgen.Structure) -> pgen.Offer | pgen.Refusal:
        """Any program with nothing to learn, whose latent sites can be drawn and observed ones evaluated."""
        if structure.params:
            why = f"importance sampling learns nothing, and {structure.params[0]!r} is to be learned"
            return pgen.Refusal(None, "fixed parameters", why)
        paths = pgen.require(structure, [pgen.Capability.SAMPLE], [pgen.Capability.LOG_PROB], self.via)
        if isinstance(paths, pgen.Refusal):
            return paths
        answers = {
            pgen.Query.SAMPLE: pgen.Exactness.EXACT,
            pgen.Query.LOG_PROB: pgen.Exactness.ESTIMATE,
            pgen.Query.POSTERIOR: pgen.Exactness.ESTIMATE,
        }
        why = f"{self.particles} draws from the prior, weighted by the likelihood"
        return pgen.Offer(answers, pgen.Rank.POSSIBLE, why, pgen.names_of(paths))

    def fit(self, problem: pgen.Problem, structure: pgen.Structure, run: pgen.Run) -> Weighted:
        """Nothing to learn: the answers are worked out when they are asked for."""
        if not vectorizes(problem, structure):
            raise pgen.errors.Refused(
                f"{structure.name} cannot be run for many particles side by side; write it so that further "
                "dimensions on the left do no harm: index and sum from the right (x[..., 0], x.sum(-1))"
            )
        return Weighted(self.particles, problem, structure)


@dataclass
class Weighted:
    """What a fit returns: one method for each query that was offered."""

    particles: int
    problem: pgen.Problem
    structure: pgen.Structure

    def sample(self, n: int) -> dict[str, Tensor]:
        """The program run forward."""
        return draw(self.problem, self.structure, n)

    def log_prob(self, problem: pgen.Problem, structure: pgen.Structure) -> pgen.Estimate:
        """The log of the mean weight (row by row, if they are independent), its error by the delta method."""
        _, log_weights = self._weigh(problem, structure)
        log_mean = log_weights.logsumexp(0) - math.log(self.particles)
        stderr = (log_weights - log_mean).exp().std(0) / math.sqrt(self.particles)
        kind, dims = pgen.Exactness.ESTIMATE, observed_scalars(problem, structure)
        return pgen.Estimate(log_mean, kind, stderr, structure.measure, dims, self.particles)

    def posterior(self, problem: pgen.Problem, structure: pgen.Structure, n: int) -> pgen.Draws:
        """Particles resampled by their smoothed weights, row by row where the rows are independent."""
        drawn, log_weights = self._weigh(problem, structure)
        if not torch.isfinite(log_weights.logsumexp(0)).all():
            raise pgen.errors.Unanswerable(
                f"none of {self.particles} draws from the prior gives the data any probability; give more "
                "particles=, or check that the data is possible under the program"
            )
        smoothed = psis(log_weights)
        index = torch.multinomial(smoothed.log_weights.T.exp(), n, replacement=True).T  # [n, rows]
        dim, values = _row_dim(structure), dict[str, Tensor]()
        for site, value in drawn.items():  # [K, *batch, *event]
            axis = None if dim is None else value.dim() - len(structure.sites[site].event_shape) + dim
            rows = value.unsqueeze(1) if axis is None else value.movedim(axis, 1)
            picked = rows[index, torch.arange(index.shape[1], device=index.device)]  # [n, rows, ...]
            values[site] = picked.squeeze(1) if axis is None else picked.movedim(1, axis)
        return pgen.Draws(values, khat=smoothed.khat)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing was learned, so nothing is to be saved."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing was saved."""

    def _weigh(self, problem: pgen.Problem, structure: pgen.Structure) -> tuple[dict[str, Tensor], Tensor]:
        """Particles of every latent site, [K, ...], and their log weights, [K, rows] (or [K, 1])."""
        trace = poutine.trace(particles(problem, structure, self.particles)).get_trace()
        trace.compute_log_prob(lambda name, node: node["is_observed"])
        drawn = {site: split(trace.nodes[site]["value"], structure, site) for site in structure.latents}
        rows = _row_dim(structure)
        log_weights = torch.zeros(self.particles, 1, device=problem.device)
        for site in trace.observation_nodes:
            log_prob = trace.nodes[site]["log_prob"]
            log_prob = log_prob.reshape(*[1] * (structure.nesting + 1 - log_prob.dim()), *log_prob.shape)
            log_prob = log_prob.unsqueeze(1) if rows is None else log_prob.movedim(rows, 1)
            log_weights = log_weights + log_prob.reshape(*log_prob.shape[:2], -1).sum(-1)
        return drawn, log_weights


def _row_dim(structure: pgen.Structure) -> int | None:
    """The batch dimension of the rows of the data; None where a latent site ties them together."""
    if structure.data_plate is None or not all(structure.local(site) for site in structure.latents):
        return None
    return structure.plates[structure.data_plate].dim


@pgen.hookimpl
def pgen_backends() -> list[type[TemplateBackend]]:
    """Tell pgen what this plugin provides."""
    return [TemplateBackend]
