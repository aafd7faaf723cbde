"""Chains over continuous and discrete latents together: the discrete ones drawn in turn, given the others.

A position is `[C, d + m]`: the unconstrained vector, then for every discrete latent that is not summed out, element by
element, the index of its value; or, where there is no list of values, the whole number itself.

Elements that do not meet in any term of the density are moved at once (`LocalGibbs`). Where a thousand elements all
meet, gradients by their one-hot codes say which changes are worth proposing (`GibbsWithGradients`), if the program can be
run on values between two corners, and if its gradients there tell the truth about the corners.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.adaptation.metric import Moments, Spread, covariance, gathered, lost, nothing, scale_of
from pgen.algorithms.adaptation.step_size import Averaging, DualAveraging
from pgen.algorithms.kernels.base import Info, untuned
from pgen.algorithms.kernels.gibbs import GibbsWithGradients
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.iterate import Wrap
from pgen.algorithms.kernels.local import LocalGibbs
from pgen.algorithms.kernels.mixed import Joint, Mixed, MixedState, MixedTuning
from pgen.algorithms.record import Recorded
from pgen.backends.mcmc.blankets import Blankets, blankets
from pgen.backends.mcmc.flips import Flips, first_choices
from pgen.backends.mcmc.ledger import Block
from pgen.backends.mcmc.samplers import Moving, thinned
from pgen.density import Density
from pgen.isolation import validating

_MANY = 300  # groups: beyond, a sweep that tries every value of each takes too long
_MOVES = 50  # proposals of `GibbsWithGradients` per draw
_TRIES = 60
_STEPS_ACCEPTED = 0.44  # best for a random walk in one dimension


class Turning(NamedTuple):
    """A warm-up on its way: the chains, their tuning, dual averaging, and how many iterations are done."""

    state: MixedState
    tuning: MixedTuning
    averaging: Averaging
    done: Tensor


@dataclass
class InTurn:
    """Sweeps over the discrete latents, and steps of a continuous kernel, alternately."""

    density: Density
    flips: Flips
    kernel: Mixed
    target: Joint
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
        widths = z.to(q.dtype).std(0, correction=0).clamp(min=1.0)
        state = self.kernel.init((q, z), self.target)
        return Turning(state, MixedTuning(tuning, widths), averaging, torch.tensor(0, device="cpu"))

    def warm(self, state: Turning) -> tuple[Turning, int]:
        """One window: the step size by dual averaging, then the scale of what was drawn."""
        done = int(state.done)
        end = next((w for w in self._windows if w > done), done + 1)
        inner, (tuning, widths), averaging, _ = state
        size = self.density.size
        moments = nothing(inner.position, dense=size <= 200) if size else None
        rule = DualAveraging(self.accept)
        heights: list[Tensor] = []
        for i in range(done, end):
            inner, info = self.kernel.step(inner, MixedTuning(tuning, widths), self.target, self.wrap)
            averaging = rule.update(averaging, info.accept.mean())
            tuning = tuning._replace(step_size=averaging.step_size)
            if moments is not None:
                moments = gathered(moments, inner.position.unsqueeze(0))
            heights.append(-info.energy)
            push = 2 * (1 + i) ** -0.5 * (inner.accept - _STEPS_ACCEPTED)
            widths = (widths * push.exp()).clamp(min=1.0)
        if end < self.warmup:
            if moments is not None and end - done >= 10:
                tuning = tuning._replace(scale=scale_of(_within(moments)))
            averaging = rule.init(averaging.averaged)
            inner = self._rescued(inner, torch.stack(heights[len(heights) // 2 :]).mean(0))
        tuning = tuning._replace(step_size=averaging.averaged)
        return Turning(
            inner, MixedTuning(tuning, widths), averaging, torch.tensor(end, device="cpu")
        ), end - done

    def _rescued(self, inner: MixedState, heights: Tensor) -> MixedState:
        """Chains whose log density `[C]` is hopelessly below that of the others begin anew beside one of them."""
        astray = lost(heights)
        if not bool(astray.any()):
            return inner
        others = (~astray).nonzero()[:, 0]
        beside = others[torch.randint(len(others), astray.shape, device=others.device)]
        source = torch.where(astray, beside, torch.arange(len(astray), device=others.device))
        return self.kernel.init((inner.position[source], inner.choices[source]), self.target)

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
            inner, info = self.kernel.step(inner, state.tuning, self.target, self.wrap)
            for _ in range(self.thin - 1):
                inner, info = self.kernel.step(inner, state.tuning, self.target, self.wrap)
            kept.append(torch.cat([inner.position, inner.choices.to(inner.position.dtype)], 1))
            infos.append(info)
        stacked = Info(*(torch.stack(parts) for parts in zip(*infos, strict=True)))
        return Moving(inner, state.tuning), thinned(torch.stack(kept), stacked, 1)


def _within(moments: Moments) -> Spread:
    """The covariance within chains.

    How far apart the modes are that chains are in, as where labels are exchangeable, says nothing about how far a
    trajectory should go.
    """
    degrees = (moments.count - 1).clamp(min=0).sum().clamp(min=1)
    return Spread(moments.scatter / degrees, covariance(moments).effective)


def in_turn(
    density: Density, lift: bool, wrap: Wrap, warmup: int | None, accept: float | None, thin: int
) -> InTurn:
    """The sampler for a density with latents that are neither moved by gradients nor summed out."""
    flips = Flips.of(density)
    z = first_choices(density, flips, 16)
    q = torch.zeros(density.size, dtype=torch.float64 if lift else density.dtype, device=z.device)
    found = blankets(density, flips, q, z)
    local = LocalGibbs(flips.cardinalities, found.scopes)

    def continuous(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return density.given_choices(q, flips.values(z))

    target = Joint(Recorded(continuous, lift=lift), Recorded(_terms(density, flips, found), lift=lift))
    kernel: Any = local
    sweeps = 1
    if len(local.colours) > _MANY and flips.fixed and not density.finite:
        slope = Recorded(_slope(density, flips), lift=lift)
        informed = GibbsWithGradients(flips.cardinalities, dtype=q.dtype)
        if _truthful(informed, slope, target.discrete, q, z):
            kernel, sweeps, target = (
                informed,
                min(_MOVES, len(flips.cardinalities)),
                Joint(target.continuous, slope),
            )
    mixed = Mixed(HMC(steps=8) if density.size else None, kernel, sweeps, shorter=0.2)
    return InTurn(density, flips, mixed, target, wrap, warmup or 400, accept or 0.8, thin)


def _terms(density: Density, flips: Flips, found: Blankets) -> Any:
    """`(q [C, d], z [C, J, m])` to sums of terms `[C, J, T]`."""

    def one(q: Tensor, z: Tensor) -> Tensor:
        return found.summed(density.terms(q, flips.values(z)), q)

    def terms(q: Tensor, z: Tensor) -> Tensor:
        with validating(False), torch.no_grad():
            return torch.vmap(torch.vmap(one, in_dims=(None, 0)))(q, z)

    return terms


def _slope(density: Density, flips: Flips) -> Any:
    """`(q [C, d], one-hot x [C, m, K])` to log density and gradient by x."""

    def one(q: Tensor, x: Tensor) -> Tensor:
        return density.relaxed(q, *flips.relaxed(x))

    def slope(q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with validating(False), torch.enable_grad():
            value = torch.vmap(one)(q, x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    return slope


def _truthful(kernel: GibbsWithGradients, slope: Any, terms: Any, q: Tensor, z: Tensor) -> bool:
    """Whether the program has gradients by one-hot codes, and these tell what changes are worth, on the whole.

    Tried on one random change in each row of z `[C, m]`. (Proposals that gradients mislead would only be refused more often.)
    """
    rows = q.expand(len(z), -1)
    i = torch.randint(z.shape[1], (len(z), 1), device=z.device)
    sizes = torch.tensor(kernel.cardinalities, device=z.device)[i]
    k = (
        z.gather(1, i) + 1 + (torch.rand_like(sizes, dtype=q.dtype) * (sizes - 1).clamp(min=1)).long()
    ) % sizes
    try:
        state = kernel.init(z, lambda x: slope(rows, x))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    worth = terms(rows, torch.stack([z, z.scatter(1, i, k)], 1)).sum(2)
    gradient = state.gradient.gather(1, i.unsqueeze(2).expand(-1, -1, state.gradient.shape[2])).squeeze(1)
    guess = (gradient.gather(1, k) - gradient.gather(1, z.gather(1, i))).squeeze(1)
    actual = worth[:, 1] - worth[:, 0]
    sound = actual.isfinite() & guess.isfinite()
    return bool((actual - guess)[sound].abs().mean() < actual[sound].abs().mean())


# --- where chains are ---


def begun(sampler: InTurn, chains: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choices `[C, m]` and a vector `[C, d]` to begin with.

    Elements that are impossible there are drawn anew, in ever wider ranges.
    """
    density, flips = sampler.density, sampler.flips
    z = first_choices(density, flips, chains)
    q = torch.zeros(chains, density.size, dtype=dtype, device=z.device)
    kernel = sampler.kernel.discrete
    if not isinstance(kernel, LocalGibbs):
        return z, q
    for attempt in range(_TRIES):
        bad = kernel.impossible(z, sampler.target.discrete(q, z.unsqueeze(1)).squeeze(1))
        if not bool(bad.any()):
            break
        z = torch.where(bad, first_choices(density, flips, chains, spread=2 ** min(attempt, 20)), z)
    return z, q


def split(density: Density, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors `[n, d]` and the indices `[n, m]` of positions."""
    return positions[:, : density.size], positions[:, density.size :].round().long()


def values_of(density: Density, flips: Flips, positions: Tensor) -> dict[str, Any]:
    """Values of all latents and deterministic sites at positions `[n, d + m]`."""
    q, z = split(density, positions)
    held = flips.values(z)
    with validating(False), torch.no_grad():
        found = torch.vmap(density.value)(q.to(density.dtype), held)
    return {**held, **found}
