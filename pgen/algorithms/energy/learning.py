r"""What learns an energy: objectives that need no normalised density, in one form.

    memory = objective.memory(data [N, *event], space)          what it keeps: chains, step size, a noise law, log Z
    learned = objective(f, x [n, *event], memory)               a surrogate for each row, and what is worth telling

where f is the log density up to a constant, values `[R, *event]` to `[R]`, differentiable in values and parameters. The
surrogate's *value* means little; the gradient of its sum is that of the log likelihood of the rows (contrastive
divergence), or of another objective, a sum over rows, that the true density maximises. So it is maximised in the place of a
log likelihood. What an objective learns besides (a learned log Z, a sampler, a flow of noise) is a parameter of its memory and
is learned by the same ascent.

Where the density is conditional, row i of R rows belongs to data row i mod n, and objectives call f with a multiple of n
rows. Those that cannot keep to it (persistent chains belong to no row) refuse.

Where the values on rows that are not learned from can be compared from step to step (they estimate the objective, not only its
gradient), the class says `scores = True`: then a run may stop early by them.

How to write one: a frozen dataclass of hyperparameters with `memory` and `__call__`. The call is straight-line: no branch on
the value of a tensor, randomness from torch's global generator, and all that it remembers in tensors of the memory, written
in place.

Three things keep all of them stable, on by default:

- a *pull* towards small energies, `pull`, as the likelihood leaves differences between faraway values undecided;
- step sizes that follow the acceptance of a corrected kernel, not hand-tuned noise;
- `escaped`, a number that is told, which becomes infinite where draws have left for good or the density of draws exceeds
  that of data without end: the energy is then unbounded below (or was not integrable), and a training loop should go back.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density

FARTHEST = 1e3
"""Distance of draws from the centre of the data, in standard deviations of the data, at which they have left for good."""
HIGHEST = 1e3
"""Nats per scalar of an event by which the mean log density of draws may exceed that of data."""


class Learned(NamedTuple):
    """What an objective returns.

    Attributes:
        surrogate: `[n]`, to be maximised.
        told: diagnostics of this call, `[]` each, without gradient.
    """

    surrogate: Tensor
    told: dict[str, Tensor]


class Objective(Protocol):
    """Learns an unnormalised density from data."""

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> nn.Module:
        """What it keeps between calls; from some of the data `[N, *event]`, two rows or more."""
        ...

    def __call__(self, f: Density, x: Tensor, memory: nn.Module) -> Learned:
        """The surrogate of data `[n, *event]`."""
        ...


def pull(weight: float, data: Tensor, draws: Tensor) -> Tensor:
    """What keeps log densities of data `[n]` and draws `[m]` together: their squared distance from their common mean.

    A regularised surrogate is `surrogate - pull(...)`. Constants are free, as they are in an energy. The likelihood of a law
    in d dimensions has log densities that vary by about d / 2, so a weight of 1e-3 moves what is learned very little, and
    stops energies of data and draws from running apart.

    >>> pull(0.5, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
    tensor([0.5000, 2.5000])
    """
    centre = (data.mean() + draws.mean()) / 2
    return weight * ((data - centre).square() + (draws - centre).square().mean())


def reversed_gradient(value: Tensor) -> Tensor:
    """The same value; its gradient has the other sign, so that what is maximised ahead is minimised behind.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> reversed_gradient(x).backward()
    >>> x.grad
    tensor(-1.)
    """
    return 2 * value.detach() - value


def rows(values: Tensor, n: int) -> Tensor:
    """The mean over draws for each row: `[k n]` to `[n]`."""
    return values.reshape(-1, n).mean(0)


def watched(frame: Frame, f_data: Tensor, f_draws: Tensor, draws: Tensor) -> dict[str, Tensor]:
    """How far draws are from data, in place and in log density.

    Returns:
        `energy_gap`: mean log density of draws less that of data, in nats: about 0 where the model is right. `spread`:
        root mean square distance of draws from the centre of the data over that of the data, about 1. `escaped`: the
        larger of the two over what is allowed, and infinite once above 1.
    """
    gap = (f_draws.mean() - f_data.mean()).detach()
    spread = frame.spread(frame.space.apart(draws.detach())[0])
    highest = HIGHEST * max(1, math.prod(frame.space.event_shape))
    worst = torch.maximum(spread / FARTHEST, gap / highest).clamp(min=0.0)
    return {"energy_gap": gap, "spread": spread, "escaped": beyond(worst)}


def beyond(value: Tensor) -> Tensor:
    """A number that stays itself up to 1, and is infinite (or not a number) above: by arithmetic, as nothing may branch.

    >>> beyond(torch.tensor([0.5, 2.0, float("nan")]))
    tensor([0.5000,    inf,    nan])
    """
    return value / (value <= 1).to(value.dtype)


class Frame(nn.Module):
    """Where the data lie in unconstrained coordinates.

    Attributes:
        space: of the values.
        centre: `[d]`.
        scale: standard deviations `[d]`.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, space: Space) -> None:
        super().__init__()
        if len(data) < 2:
            raise ValueError(f"two rows of data or more tell where they lie, got {len(data)}")
        self.space = space
        q = space.apart(data.detach())[0]
        self.register_buffer("centre", q.mean(0))
        variance = (q - q.mean(0)).square().sum(0) / (len(q) - 1)
        self.register_buffer("scale", variance.sqrt().clamp(min=1e-6))

    def spread(self, q: Tensor) -> Tensor:
        """Root mean square of standardised coordinates `[C, d]`; 1 where nothing is measured."""
        if not q.shape[1]:
            return torch.ones((), dtype=q.dtype, device=q.device)
        return ((q - self.centre) / self.scale).square().mean().sqrt()


def roughened(x: Tensor, frame: Frame, noise: float) -> Tensor:
    """Values with noise on what is measured, in standard deviations of the data."""
    if not noise or not frame.space.dims:
        return x
    q, z = frame.space.apart(x)
    return frame.space.together(q + noise * frame.scale * torch.randn_like(q), z)


def changed(q: Tensor, z: Tensor, frame: Frame, width: Tensor, flip: float) -> tuple[Tensor, Tensor]:
    """A symmetric change: normal noise of `width` `[R, 1]` standard deviations of the data, and some indices drawn anew."""
    other = frame.space.uniform(len(z), q)[1]
    again = torch.rand(z.shape, dtype=q.dtype, device=q.device) < flip
    return q + width * frame.scale * torch.randn_like(q), torch.where(again, other, z)


def log_uniform(low: float, high: float, n: int, like: Tensor) -> Tensor:
    """Numbers `[n, 1]` between two positive ones, log-uniform."""
    u = torch.rand(n, 1, dtype=like.dtype, device=like.device)
    return low * (u * math.log(high / low)).exp()


def widths(narrow: float, wide: float, flip: float) -> None:
    """Raise unless these are widths of noise and a probability."""
    if not 0 < narrow <= wide:
        raise ValueError(f"widths of noise are positive and in order, got narrow={narrow}, wide={wide}")
    if not 0 < flip <= 1:
        raise ValueError(f"flip is a probability above 0, got {flip}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise unless a hyperparameter is as large as it must be."""
    if not value >= least:
        raise ValueError(f"{name} is at least {least}, got {value}")
