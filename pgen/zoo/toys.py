"""Laws on the plane whose densities are exact, to see what a program cannot learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.zoo.data import Data


@dataclass(frozen=True)
class Toy:
    """A law on the plane: draws, exact log density, and the entropy where it has a closed form.

    Attributes:
        name: how it is asked for.
        law: a Pyro distribution of event shape `(2,)`.
        reach: the square `[-reach, reach]^2` holds all but a mass of 1e-9.
        entropy: in nats; None where there is no closed form. No program can do better than minus this on
            average.
    """

    name: str
    law: TorchDistribution
    reach: float
    entropy: float | None = None

    def sample(self, n: int, *, seed: int) -> Tensor:
        """Draw `n` points, shape `[n, 2]`, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.law.sample((n,))

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density, in nats, of points `[..., 2]`."""
        return self.law.log_prob(x)

    def data(self) -> Data:
        """The toy as a data set: 10,000 points to learn from, 2,000 and 5,000 more."""
        sizes = zip((10_000, 2_000, 5_000), range(3), strict=True)
        train, valid, test = ({"x": self.sample(n, seed=seed)} for n, seed in sizes)
        text = f"points on the plane drawn from a known law ({self.name})"
        licence = "MIT (made by pgen)"
        return Data(
            self.name, train, valid, test, "density", (2,), truth=self.law, description=text, licence=licence
        )


def gaussian_mixture(centres: Tensor, scale: float, weights: Tensor | None = None) -> TorchDistribution:
    """A mixture of round Gaussians of one scale around `centres` `[k, 2]`; equal weights by default."""
    weights = torch.ones(len(centres)) if weights is None else weights
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centres, scale).to_event(1))


def ring(modes: int = 8, radius: float = 1.0, scale: float = 0.01) -> Toy:
    """Gaussians on a circle, as in PacGAN (Lin et al. 2018): eight of standard deviation 0.01 at radius 1."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    centres = radius * torch.stack([angle.cos(), angle.sin()], -1)
    apart = 2 * radius * math.sin(math.pi / modes)
    reach = radius + 7 * scale
    return Toy("ring", gaussian_mixture(centres, scale), reach, _mixture_entropy(modes, scale, apart))


def grid(side: int = 5, spacing: float = 2.0, scale: float = 0.05) -> Toy:
    """Gaussians on a square grid, as in PacGAN: 25 of standard deviation 0.05 on {-4, -2, 0, 2, 4}^2."""
    ticks = (torch.arange(side) - (side - 1) / 2) * spacing
    centres = torch.cartesian_prod(ticks, ticks)
    reach = float(ticks.max()) + 7 * scale
    return Toy("grid", gaussian_mixture(centres, scale), reach, _mixture_entropy(side**2, scale, spacing))


def moons(points: int = 64, scale: float = 0.1) -> Toy:
    """Two interleaved half circles of radius 1, blurred: Gaussians at `points` places along each arc.

    The places are closer to each other than one standard deviation, so the law looks continuous, and its
    density is exact as it is a finite mixture. Its entropy has no closed form.
    """
    angle = (torch.arange(points) + 0.5) * (math.pi / points)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    lower = -upper
    reach = 1.5 + 7 * scale
    return Toy("moons", gaussian_mixture(torch.cat([upper, lower]), scale), reach)


def gaussians() -> Toy:
    """Three Gaussians of weights 0.5, 0.3, 0.2 and standard deviation 0.5, which overlap a little."""
    centres = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.5]])
    return Toy("gaussians", gaussian_mixture(centres, 0.5, torch.tensor([0.5, 0.3, 0.2])), reach=5.0)


def checkerboard(side: int = 4, reach: float = 4.0) -> Toy:
    """Uniform on the dark squares of a board of `side` x `side` squares over `[-reach, reach]^2`."""
    law = Checkerboard(side, reach)
    return Toy("checkerboard", law, reach, law.log_area)


class Checkerboard(TorchDistribution):
    r"""Uniform on the dark squares of a chess board over $[-r, r]^2$; the square at the lower left is dark.

    Args:
        side: squares along an edge.
        reach: half the edge, $r$.

    >>> board = Checkerboard(4, 4.0)
    >>> bool((board.log_prob(board.sample((100,))) == -board.log_area).all())
    True
    """

    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, side: int = 4, reach: float = 4.0, *, batch_shape: Size = Size()) -> None:
        self.side, self.reach = side, reach
        self.square = 2 * reach / side
        row, column = torch.arange(side)[:, None], torch.arange(side)[None]
        self.dark = ((row + column) % 2 == 0).nonzero()
        self.log_area = math.log(len(self.dark) * self.square**2)
        super().__init__(batch_shape, Size((2,)), validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Checkerboard:
        """The same law over another batch shape."""
        return Checkerboard(self.side, self.reach, batch_shape=Size(batch_shape))

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws of shape `[*sample_shape, *batch_shape, 2]`."""
        shape = Size(sample_shape) + self.batch_shape
        which = self.dark[torch.randint(len(self.dark), shape)]
        low = which * self.square - self.reach
        high = (low + self.square).float()
        x = low + self.square * torch.rand(*shape, 2)
        return torch.minimum(
            x, torch.nextafter(high, low)
        )  # rounding must not carry a draw into the next square

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log of the dark area inside, minus infinity outside."""
        cell = ((value + self.reach) / self.square).floor()
        inside = ((cell >= 0) & (cell < self.side)).all(-1) & (cell.sum(-1) % 2 == 0)
        flat = torch.full_like(value[..., 0], -self.log_area)
        return torch.where(inside, flat, torch.full_like(flat, -math.inf))


def _mixture_entropy(modes: int, scale: float, apart: float) -> float | None:
    """Entropy of equal Gaussians on the plane, where overlap adds less than exp(-32)."""
    return math.log(modes) + 1.0 + math.log(2 * math.pi * scale**2) if apart >= 16 * scale else None


def sequences(folder: Path | None = None) -> Data:
    """Sequences of 12 symbols out of 5, from a known hidden Markov model of 3 states that rarely move."""
    start, move = torch.full((3,), 1 / 3), torch.full((3, 3), 0.05) + 0.85 * torch.eye(3)
    show = torch.tensor([[0.7, 0.2, 0.1, 0.0, 0.0], [0.0, 0.15, 0.7, 0.15, 0.0], [0.0, 0.0, 0.1, 0.2, 0.7]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = dist.Categorical(start).sample((3000,))
        symbols = [dist.Categorical(show[state]).sample()]
        for _ in range(11):
            state = dist.Categorical(move[state]).sample()
            symbols.append(dist.Categorical(show[state]).sample())
    train, valid, test = ({"x": x} for x in torch.stack(symbols, -1).split(1000))
    text = "sequences of symbols drawn from a known hidden Markov model"
    licence, known = "MIT (made by pgen)", {"states": 3, "symbols": 5}
    return Data(
        "sequences", train, valid, test, "mass", (12,), 5, description=text, licence=licence, more=known
    )


def readers(
    toys: Sequence[Callable[[], Toy]] = (ring, grid, moons, checkerboard, gaussians),
) -> dict[str, Any]:
    """A reader of each toy as a data set, by name."""
    return {toy.__name__: _reader(toy) for toy in toys}


def _reader(toy: Callable[[], Toy]) -> Callable[[Path | None], Data]:
    def read(folder: Path | None = None) -> Data:
        return toy().data()

    read.__doc__ = toy.__doc__
    return read
