r"""Score matching: the gradient of log density, fitted to that of the data, of which only draws are known.

With s = grad f, the Fisher divergence E|s - grad log p|^2 / 2 is, up to a constant that is not known,

    E[ |s|^2 / 2 + tr ds/dx ]                           `ScoreMatching`: the trace exactly, d products
    E[ |s|^2 / 2 + v . ds/dx v ],   E[v v'] = I         `SlicedScoreMatching`: along random signs
    E[ |s(x + w e) + e / w|^2 / 2 ]                     `DenoisingScoreMatching`: the same for data with noise of width w

No chains, no partition function; the parameters of the energy are reached through second derivatives, so networks are smooth
(SiLU, not ReLU). All of it happens in unconstrained coordinates, standardised by the data.

The divergence looks only where the data are. Of modes with emptiness between them it does not see the weights, and in the
emptiness it leaves the density undecided, which then has mass of its own. And data with a sharp edge have no score there.
Noise cures all of it: what is matched is then the law of the data *with* noise, which is smooth, and fills the emptiness
where the noise is wide. So most rows carry noise of width `noise`, the bias of what is learned, and a `share` of them wider
noise, log-uniform up to `wide` standard deviations of the data. One density cannot match several noise levels; where data
are dense the many narrow rows decide, and elsewhere the few wide ones. Their pull on the fine detail is the price.

References:
    Hyvarinen, Estimation of non-normalized statistical models by score matching, JMLR 6, 2005.
    Vincent, A connection between score matching and denoising autoencoders, Neural Computation 23, 2011.
    Song, Garg, Shi & Ermon, Sliced score matching, UAI 2019: the variance-reduced form, |s|^2 for (v . s)^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pgen.algorithms.energy.learning import Frame, Learned, at_least, log_uniform
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


@dataclass(frozen=True)
class Matching:
    """What score matching objectives share: noise on the data.

    Attributes:
        noise: width of the noise, in standard deviations of the data: what is learned is the law of data with it.
        wide: greatest width.
        share: of the rows, whose noise is wider.
        anneal: calls over which the noise of all rows falls from `wide` to `noise`: at first it joins modes that a score
            does not know the weights of.
    """

    scores: ClassVar[bool] = True
    noise: float = 0.02
    wide: float = 1.0
    share: float = 0.1
    anneal: int = 1000

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        at_least("noise", self.noise, 0)
        if not 0 <= self.share < 1:
            raise ValueError(f"share is a fraction of the rows below 1, got {self.share}")
        if self.share and not 0 < self.noise <= self.wide:
            raise ValueError(
                f"wider noise is log-uniform between noise and wide, 0 < noise <= wide; got noise={self.noise}, "
                f"wide={self.wide}; share=0 is for data without noise"
            )

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Levels:
        """Where the data lie.

        Raises:
            ValueError: some numbers are counted.
        """
        if space.cardinalities:
            raise ValueError(
                "a score is a derivative, and the space has numbers that are counted; use PseudoLikelihood, "
                "EnergyDiscrepancy or contrastive divergence"
            )
        return Levels(data, space)

    def _data(self, x: Tensor, memory: Levels) -> tuple[Tensor, Tensor]:
        """Standardised coordinates `[n, d]`, and a width of noise for each row, `[n, 1]`."""
        q = (memory.space.apart(x.detach())[0] - memory.centre) / memory.scale
        if not self.noise:
            return q, torch.zeros_like(q[:, :1])
        left = torch.zeros_like(
            memory.calls
        )  # held-out rows are looked at as at the end, so that looks compare
        if memory.training:
            left = (1 - memory.calls / max(1, self.anneal)).clamp(min=0.0)
            memory.calls.add_(1.0)
        width = (self.noise * (self.wide / self.noise) ** left).expand(len(q), 1)
        if self.share:
            wider = torch.rand_like(width) < self.share
            width = torch.where(wider, log_uniform(self.noise, self.wide, len(q), q), width)
        return q, width


class Levels(Frame):
    """Where the data lie, and how often it was called."""

    calls: Tensor

    def __init__(self, data: Tensor, space: Space) -> None:
        super().__init__(data, space)
        self.register_buffer("calls", torch.zeros_like(self.centre.sum()))


def score(f: Density, u: Tensor, memory: Frame) -> Tensor:
    """Gradient `[R, d]` of the log density of standardised coordinates, itself differentiable."""
    with torch.enable_grad():
        u = u if u.requires_grad else u.requires_grad_()
        q = memory.centre + memory.scale * u
        empty = torch.zeros(len(q), 0, dtype=torch.long, device=q.device)
        value = f(memory.space.together(q, empty)) + memory.space.volume(q)
        return torch.autograd.grad(value.sum(), u, create_graph=True)[0]


def _told(s: Tensor, fit: Tensor) -> dict[str, Tensor]:
    """The root mean square of scores; and the objective over |s|^2 / 2, which is -1 where scores are right."""
    size = s.detach().square().sum(1).mean()
    return {"score_size": size.sqrt(), "fit": fit.detach().mean() / (size / 2)}


@dataclass(frozen=True)
class ScoreMatching(Matching):
    """Hyvarinen's objective with the exact trace: d products with the Hessian.

    Attributes:
        noise: 0 by default: that of the paper; smooth data without emptiness.

    Example:
        A Gaussian of variance v at data of second moment m: -m / (2 v^2) + 1 / v.

        >>> from torch.distributions import constraints
        >>> x, sm = torch.tensor([[1.0], [-1.0]]), ScoreMatching()
        >>> learned = sm(lambda x: -x.square().sum(-1) / 2, x, sm.memory(x, Space.of(constraints.real, (1,))))
        >>> learned.surrogate.detach()  # in units in which the data have variance 1
        tensor([1., 1.])
    """

    noise: float = 0.0
    share: float = 0.0

    def __call__(self, f: Density, x: Tensor, memory: Levels) -> Learned:
        """Minus the objective of each row."""
        u, width = self._data(x, memory)
        u = (u + width * torch.randn_like(u)).requires_grad_()
        s = score(f, u, memory)
        trace = torch.stack(
            [torch.autograd.grad(s[:, i].sum(), u, create_graph=True)[0][:, i] for i in range(u.shape[1])]
        ).sum(0)
        loss = s.square().sum(1) / 2 + trace
        return Learned(-loss, _told(s, loss))


@dataclass(frozen=True)
class SlicedScoreMatching(Matching):
    """The trace along random signs, one product with the Hessian for each.

    Attributes:
        slices: directions for each row.
    """

    slices: int = 1

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        super().__post_init__()
        at_least("slices", self.slices, 1)

    def __call__(self, f: Density, x: Tensor, memory: Levels) -> Learned:
        """Minus the objective of each row."""
        u, width = self._data(x, memory)
        u = (u + width * torch.randn_like(u)).requires_grad_()
        s = score(f, u, memory)
        curvature = torch.zeros_like(s[:, 0])
        for _ in range(self.slices):
            v = torch.where(torch.rand_like(u) < 0.5, -1.0, 1.0).to(u)
            along = torch.autograd.grad((s * v).sum(), u, create_graph=True)[0]
            curvature = curvature + (along * v).sum(1) / self.slices
        loss = s.square().sum(1) / 2 + curvature
        return Learned(-loss, _told(s, loss))


@dataclass(frozen=True)
class DenoisingScoreMatching(Matching):
    """Vincent's objective, with noise e and -e for every row.

    e / w has an infinite mean square for small w, and of the pair only the difference of scores is left of it. The square
    of e / w, which nothing depends on, is left out.

    Narrow noise is then sliced score matching, with a finite difference for the derivative.
    """

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        super().__post_init__()
        if not self.noise > 0:
            raise ValueError(f"denoising needs noise, got noise={self.noise}")

    def __call__(self, f: Density, x: Tensor, memory: Levels) -> Learned:
        """Minus the objective of each row."""
        u, width = self._data(x, memory)
        e = torch.randn_like(u)
        s = score(f, torch.cat([u + width * e, u - width * e]), memory)
        plus, minus = s.chunk(2)
        size = (plus.square() + minus.square()).sum(1) / 4
        loss = size + ((plus - minus) * e).sum(1) / (2 * width.squeeze(1))
        return Learned(-loss, _told(s, loss))
