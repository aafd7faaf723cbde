"""Chains over continuous and finite latents together: the finite ones drawn in turn, given the others.

A position is `[C, d + m]`: the unconstrained vector, then for every finite latent that is not summed out the index of
its value, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pgen.algorithms.adaptation.metric import covariance, gathered, nothing, scale_of
from pgen.algorithms.adaptation.step_size import Averaging, DualAveraging
from pgen.algorithms.kernels.base import Info, Tuning, untuned
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.iterate import Wrap, iterate
from pgen.algorithms.kernels.mixed import Joint, Mixed, MixedState
from pgen.algorithms.record import Recorded
from pgen.backends.mcmc.ledger import Block
from pgen.backends.mcmc.samplers import Moving, thinned
from pgen.density import Density
from pgen.isolation import validating

_MANY = 32  # elements: beyond, a sweep that tries every value of each costs too much


@dataclass(frozen=True)
class Flips:
    """The finite latents that chains move.

    Attributes:
        shapes: batch shape of each, by site.
        supports: values of each, `[K, *event]`.
        binary: whether all are Bernoulli, whose density can be differentiated by the value.
    """

    shapes: Mapping[str, torch.Size]
    supports: Mapping[str, Tensor]
    binary: bool

    @staticmethod
    def of(density: Density) -> Flips:
        """Those of a density."""
        shapes: dict[str, torch.Size] = {}
        supports: dict[str, Tensor] = {}
        with validating(False), torch.no_grad():
            nodes: Any = poutine.trace(density.problem).get_trace().nodes
        for name in density.held:
            fn = nodes[name]["fn"]
            event = len(fn.event_shape)
            value = nodes[name]["value"]
            shapes[name] = value.shape[: value.dim() - event]
            support = fn.enumerate_support(expand=False)
            supports[name] = support.reshape(support.shape[:1] + support.shape[support.dim() - event :])
        kinds = {density.structure.sites[name].distribution for name in density.held}
        return Flips(shapes, supports, kinds == {"Bernoulli"})

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Numbers of values, element by element."""
        return tuple(len(self.supports[name]) for name, size in self.sizes.items() for _ in range(size))

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Indices `[n, m]` as values `[n, *batch, *event]` by site."""
        parts = z.long().split(list(self.sizes.values()), -1)
        return {
            name: support[part].reshape(len(z), *self.shapes[name], *support.shape[1:])
            for (name, support), part in zip(self.supports.items(), parts, strict=True)
        }

    def relaxed(self, x: Tensor) -> dict[str, Tensor]:
        """One-hot codes `[C, m, 2]` of binary latents as their values, differentiable."""
        parts = x[..., 1].split(list(self.sizes.values()), -1)
        return {
            name: part.reshape(len(x), *self.shapes[name])
            for name, part in zip(self.sizes, parts, strict=True)
        }


class Turning(NamedTuple):
    """A warm-up on its way: the chains, their tuning, dual averaging, and how many iterations are done."""

    state: MixedState
    tuning: Tuning
    averaging: Averaging
    done: Tensor


@dataclass
class InTurn:
    """Sweeps over the finite latents, and steps of a continuous kernel, alternately."""

    density: Density
    flips: Flips
    kernel: Any  # `Mixed`, whose positions and targets are pairs
    target: Any
    wrap: Wrap
    warmup: int = 400
    accept: float = 0.8
    thin: int = 1
    _windows: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self._windows = tuple(sorted({max(1, self.warmup * k // 20) for k in (1, 3, 8, 16, 20)}))

    def begin(self, position: Tensor) -> Turning:
        """The state before warm-up, at positions `[C, d + m]`."""
        q, z = split(self.density, position)
        tuning = untuned(q, 0.1)
        averaging = DualAveraging(self.accept).init(tuning.step_size)
        return Turning(self.kernel.init((q, z), self.target), tuning, averaging, torch.tensor(0))

    def warm(self, state: Turning) -> tuple[Turning, int]:
        """One window: the step size by dual averaging, then the scale of what was drawn."""
        done = int(state.done)
        end = next((w for w in self._windows if w > done), done + 1)
        inner, tuning, averaging, _ = state
        moments = nothing(inner.position, dense=self.density.size <= 200)
        rule = DualAveraging(self.accept)
        for _ in range(end - done):
            inner, positions, info = iterate(self.kernel, inner, tuning, self.target, 1, self.wrap)
            averaging = rule.update(averaging, info.accept.mean())
            tuning = tuning._replace(step_size=averaging.step_size)
            moments = gathered(moments, positions)
        if end < self.warmup:
            if end - done >= 10:
                tuning = tuning._replace(scale=scale_of(covariance(moments)))
            averaging = rule.init(averaging.averaged)
        tuning = tuning._replace(step_size=averaging.averaged)
        return Turning(inner, tuning, averaging, torch.tensor(end)), end - done

    def warmed(self, state: Turning) -> bool:
        """Whether all windows are done."""
        return int(state.done) >= self.warmup

    def ready(self, state: Turning) -> Moving:
        """The state before the first draw."""
        return Moving(state.state, state.tuning)

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """So many draws of each chain."""
        inner = state.kernel
        kept: list[Tensor] = []
        infos: list[Info] = []
        for _ in range(draws):
            inner, _, info = iterate(self.kernel, inner, state.tuning, self.target, self.thin, self.wrap)
            kept.append(torch.cat([inner.position, inner.choices.to(inner.position.dtype)], 1))
            infos.append(type(info)(*(part[-1] for part in info)))
        stacked = Info(*(torch.stack(parts) for parts in zip(*infos, strict=True)))
        return Moving(inner, state.tuning), thinned(torch.stack(kept), stacked, 1)


def in_turn(
    density: Density, lift: bool, wrap: Wrap, warmup: int | None, accept: float | None, thin: int
) -> InTurn:
    """The sampler for a density with latents that are neither moved by gradients nor summed out."""
    flips = Flips.of(density)
    relaxed = flips.binary and len(flips.cardinalities) > _MANY

    def continuous(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if not density.size:  # kernels want something to move: a standard normal that nothing depends on
            return density.given_choices(q[:, :0], flips.values(z))[0] - q.square().sum(-1) / 2, -q
        return density.given_choices(q, flips.values(z))

    def value(q: Tensor, z: Tensor) -> Tensor:
        with validating(False), torch.no_grad():
            q = q[:, : density.size]
            return torch.vmap(density.given_choice)(q, flips.values(z))

    def slope(q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x, q = x.detach().requires_grad_(), q[:, : density.size]
        with validating(False), torch.enable_grad():
            found = torch.vmap(density.given_choice)(q, flips.relaxed(x))
            (gradient,) = torch.autograd.grad(found.sum(), x)
        return found.detach(), gradient

    discrete: Any = slope if relaxed else value
    kernel = (GibbsWithGradients if relaxed else Gibbs)(flips.cardinalities)
    target = Joint(Recorded(continuous, lift=lift), Recorded(discrete, lift=lift))
    mixed = Mixed(HMC(steps=8), kernel)
    return InTurn(density, flips, mixed, target, wrap, warmup or 400, accept or 0.8, thin)


def first_choices(flips: Flips, chains: int) -> Tensor:
    """Indices drawn uniformly, `[C, m]`."""
    return torch.stack([torch.randint(k, (chains,)) for k in flips.cardinalities], 1)


def split(density: Density, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors `[n, d]` (`[n, 1]` where there is nothing to move) and the indices `[n, m]` of positions."""
    width = max(1, density.size)
    return positions[:, :width], positions[:, width:].long()


def values_of(density: Density, flips: Flips, positions: Tensor) -> dict[str, Any]:
    """Values of all latents and deterministic sites at positions `[n, d + m]`."""
    q, z = split(density, positions)
    held = flips.values(z)
    with validating(False), torch.no_grad():
        found = torch.vmap(density.value)(q[:, : density.size].to(density.dtype), held)
    return {**held, **found}
