"""What a program with diffusions is trained by: a denoising loss at each of these sites, log probabilities at the others.

    loss = sum over diffusions of w(sigma) |x - D(x + sigma eps, sigma)|^2 - sum over the other sites of log p

Each row has one noise level, and together these cover the schedule evenly; each element has noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Size, Tensor

from pgen.algorithms.diffusion import coupling, guidance, losses
from pgen.algorithms.diffusion.field import per_row, score_of
from pgen.algorithms.diffusion.schedules import Schedule
from pgen.algorithms.diffusion.sliced import sliced
from pgen.algorithms.diffusion.times import Importance
from pgen.algorithms.diffusion.weightings import LearnedVariance, Weighting
from pgen.backends.score.prior import counted, denoising_law
from pgen.distributions.denoising import over_rows
from pgen.problem import Problem
from pgen.run import Step


@dataclass(frozen=True)
class Objective:
    """The loss of a law with a denoiser at values.

    Attributes:
        weighting: from a schedule to weights of squared errors by noise level.
        spread: from uniform numbers `[B]` to quantiles of noise levels, `[B]`.
        variance: learns the weights, where they are learned.
        histograms: of losses by quantile, site by site, where levels are drawn where losses are large.
        slices: match scores along so many random directions, instead of denoising; 0: denoise.
        coupled: pair noise with data.
        dropout: share of the rows that lose their condition.
    """

    weighting: Callable[[Schedule], Weighting]
    spread: Callable[[Tensor], Tensor]
    variance: LearnedVariance | None = None
    histograms: Mapping[str, Importance] | None = None
    slices: int = 0
    coupled: bool = False
    dropout: float = 0.0
    metric: ClassVar[str] = "denoising"

    def at(self, batch: Problem, step: Step) -> Objective:
        """The loss for a batch at a step: the same for all."""
        if self.coupled:
            step.as_written("pairs data with noise, which torch does not see")
        return self

    def __call__(self, name: str, law: Any, value: Tensor) -> Tensor:
        """Losses `[*lead]` of values `[*lead, *event_shape]` of a site, means over the scalars of an event."""
        law, lead, x, _ = laid_out(law, value, self.dropout)
        u = self.spread(torch.rand(len(x), dtype=x.dtype, device=x.device))
        ratio: Tensor | float = 1.0
        histogram = None if self.histograms is None else self.histograms[name]
        if histogram is not None:
            u, ratio = histogram.draw(u)
        sigma = law.schedule.training(u).to(x)
        noise = torch.randn_like(x)
        if self.coupled:
            context = getattr(law, "context", None)
            noise = coupling.coupled(
                x, noise, context=None if context is None else context.reshape(len(x), -1)
            )
        found = self._matched(over_rows(law, lead), law.schedule, x, sigma, noise)
        if histogram is not None:
            remember(histogram, u, found)
        if self.variance is not None:
            found = self.variance(found, sigma)
        return (found * ratio).reshape(lead)

    def _matched(self, denoiser: Any, schedule: Schedule, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        weighting = self.weighting(schedule)
        if not self.slices:
            return losses.denoising(denoiser, x, sigma, noise, weighting)
        ways = torch.randn(self.slices, *x.shape, dtype=x.dtype, device=x.device).sign()
        found = sliced(lambda y: score_of(denoiser(y, sigma), y, sigma), x + per_row(sigma, x) * noise, ways)
        # A score is 1 / sigma^2 times an error of the denoised value.
        return weighting(sigma) * sigma**4 * found / max(1, x[0].numel())


class SiteLoss(Protocol):
    """What a site with a denoiser is trained by.

    Attributes:
        metric: what its losses are called in the history.
    """

    metric: ClassVar[str]

    def at(self, batch: Problem, step: Step) -> Callable[[str, Any, Tensor], Tensor]:
        """The loss for a batch at a step: from a site's name, law and values `[*lead, *event]` to losses `[*lead]`."""
        ...


def laid_out(law: Any, value: Tensor, dropout: float) -> tuple[Any, Size, Tensor, Tensor | None]:
    """A law and its values as losses take them.

    Args:
        law: with a denoiser.
        value: `[*lead, *event_shape]`; whole numbers, where the law sees real values through cells.
        dropout: share of the rows that lose their condition.

    Returns:
        The law under the conditions that are left; the leading dimensions; real values `[rows, *event_shape]`; and
        the numbers by whose size rows have lost their condition, `[*lead]`, None where none could.
    """
    inside: Callable[[Tensor], Tensor] | None = getattr(law, "inside", None)
    real = value if inside is None else inside(value)
    if not real.is_floating_point():
        real = real.to(law.like.dtype)
    event = len(law.event_shape)
    lead = Size(np.broadcast_shapes(real.shape[: real.dim() - event], law.batch_shape))
    x = real.expand(lead + law.event_shape).reshape(-1, *law.event_shape)
    if getattr(law, "context", None) is None:
        return law, lead, x, None
    u = torch.rand(lead, dtype=x.dtype, device=x.device) if dropout else None
    return conditioned(law, lead, u, dropout), lead, x, u


def conditioned(law: Any, lead: Size, u: Tensor | None, dropout: float) -> Any:
    """A law under its condition, one for each value, but where u `[*lead]` is below the share that loses theirs."""
    context = law.context.expand(*lead, law.context.shape[-1])
    return law.conditioned(context if u is None else guidance.drop_condition(context, u, dropout))


@torch.no_grad()
def remember(histogram: Importance, u: Tensor, loss: Tensor) -> None:
    """Take losses into a histogram, in place: its tensors are saved and undone like any other."""
    new = histogram.update(u, loss)
    histogram.square.copy_(new.square)
    histogram.mass.copy_(new.mass)


def loss_of(
    objective: SiteLoss, matched: Collection[str], weighed: Collection[str], rows: int
) -> Callable[[Problem, Step], tuple[Tensor, dict[str, float | Tensor]]]:
    """The loss of a program, per row.

    Args:
        objective: at sites with a denoiser.
        matched: names of these.
        weighed: sites that have a log probability.
        rows: by which to divide where the data has none.
    """

    def loss(batch: Problem, step: Step) -> tuple[Tensor, dict[str, float | Tensor]]:
        site_loss = objective.at(batch, step)
        trace: Any = poutine.trace(batch).get_trace()
        metrics: dict[str, float | Tensor] = {}
        total: Tensor | float = 0.0
        for name in matched:
            node = trace.nodes[name]
            each = site_loss(name, denoising_law(node["fn"]), node["value"])
            each = scale_and_mask(counted(node["fn"], each), node["scale"], node["mask"])
            metrics[f"{name}.{objective.metric}"] = each.detach().mean()
            total = total + each.sum()
        trace.compute_log_prob(lambda name, _: name in weighed)
        for name in weighed:
            total = total - trace.nodes[name]["log_prob_sum"]
        return torch.as_tensor(total) / (batch.rows or rows), metrics

    return loss
