"""Markov kernels for discrete variables, C chains at once.

    Gibbs               draws a variable (or a block) from its exact conditional: every value is tried
    GibbsWithGradients  proposes the one change that a linear model of the density likes; one gradient a move

A discrete position is a tensor of indices `[C, m]`, variable i in 0..K_i-1. The densities are

    Gibbs               log_density(z [R, m]) -> [R], for any number of rows R
    GibbsWithGradients  log_density(x [C, m, K]) -> [C] and gradient [C, m, K], x one-hot, K the largest K_i

(`discrete_langevin` changes many variables at once, by the same gradients.) The kernels follow the protocol of `base`, without tuning. Shapes are fixed and nothing branches on a value, so a
step can be recorded.

References:
    Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images (Geman & Geman, IEEE PAMI
    1984). Oops I Took A Gradient: Scalable Sampling for Discrete Distributions (Grathwohl, Swersky, Hashemi,
    Duvenaud & Maddison, ICML 2021), arXiv:2102.04509. Informed Proposals for Local MCMC in Discrete Spaces
    (Zanella, JASA 2020), arXiv:1711.07424.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, Tuning, where
from pgen.algorithms.kernels.hmc import gained

DiscreteDensity = Callable[[Tensor], Tensor]
RelaxedDensity = Callable[[Tensor], tuple[Tensor, Tensor]]


# --- exact conditionals ---


class GibbsState(NamedTuple):
    """Indices `[C, m]` and the log density there `[C]`."""

    position: Tensor
    log_density: Tensor


class Block(NamedTuple):
    """Variables that are drawn together, and how one number, their code, tells all their values.

    A value is `code // stride % size`, and the code is `sum_i z_i weight_i`. Rows are chains, or a single one for
    all.

    Attributes:
        index: which variables, `[1 | C, w]`; may name one twice to fill a row.
        weight: what a variable counts in the code, `[1 | C, w]`; 0 where it was named before.
        stride: `[1 | C, w]`.
        size: number of values of each variable, `[1 | C, w]`.
        states: number of values of the code, `[1 | C, 1]`.
    """

    index: Tensor
    weight: Tensor
    stride: Tensor
    size: Tensor
    states: Tensor

    def code(self, z: Tensor) -> Tensor:
        """The code of these variables in `z` `[C, m]`: `[C, 1]`; of a single variable, its value."""
        values = z.gather(1, self.index.expand(len(z), -1))
        return values if values.shape[1] == 1 else (values * self.weight).sum(1, keepdim=True)

    def assign(self, z: Tensor, code: Tensor) -> Tensor:
        """`z` `[C, m]` with these variables set as J codes `[C, J]` say: `[C, J, m]`."""
        values = code.unsqueeze(2)
        if self.index.shape[1] > 1:
            values = values // self.stride.unsqueeze(1) % self.size.unsqueeze(1)
        index = self.index.unsqueeze(1).expand(values.shape)
        return z.unsqueeze(1).expand(-1, code.shape[1], -1).scatter(2, index, values)


@dataclass(frozen=True)
class Gibbs:
    r"""Draw each variable in turn from its exact conditional.

    .. math:: z_i \sim \pi(z_i \mid z_{-i}) \propto \pi(z_i, z_{-i})

    All other values of a variable are tried in one call of the density with `C (K_i - 1)` rows; that of the present
    value is known. A step is one sweep over all blocks.

    Args:
        cardinalities: number of values of each of the m variables.
        blocks: variables to be drawn jointly, by enumeration of all their combinations; every variable must be in
            one. Without it every variable is a block.
        scan: `"systematic"` visits the blocks in their order, `"random"` in a random order of each chain's own
            (each call then has as many rows as the largest block needs).

    Raises:
        ValueError: a cardinality is below 1, a block names an unknown variable or a variable is in no block.

    Example:
        >>> kernel = Gibbs((2, 3))
        >>> target = lambda z: -100.0 * (z[:, 0] - 1) ** 2 - 100.0 * (z[:, 1] - 2) ** 2
        >>> state = kernel.init(torch.zeros(2, 2, dtype=torch.long), target)
        >>> kernel.step(state, None, target)[0].position
        tensor([[1, 2],
                [1, 2]])
    """

    cardinalities: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...] | None = None
    scan: Literal["systematic", "random"] = "systematic"

    def __post_init__(self) -> None:
        """Check the sizes and that the blocks cover everything."""
        check_cardinalities(self.cardinalities)
        if self.scan not in ("systematic", "random"):
            raise ValueError(f"scan is 'systematic' or 'random', got {self.scan!r}")
        named = {i for block in self.blocks or () for i in block}
        if self.blocks is not None and (named != set(range(len(self.cardinalities))) or not all(self.blocks)):
            raise ValueError(
                f"blocks must be non-empty and together name all variables 0..{len(self.cardinalities) - 1}, got "
                f"{self.blocks}; give every variable that should be on its own a block (i,)"
            )

    @cached_property
    def _blocks(self) -> tuple[tuple[int, ...], ...]:
        blocks = self.blocks or tuple((i,) for i in range(len(self.cardinalities)))
        return tuple(tuple(dict.fromkeys(block)) for block in blocks)  # each variable once

    @cached_property
    def _states(self) -> tuple[int, ...]:
        return tuple(math.prod(self.cardinalities[i] for i in block) for block in self._blocks)

    @cached_property
    def _single(self) -> tuple[Block, ...]:
        return tuple(_block(self.cardinalities, block, len(block)) for block in self._blocks)

    @cached_property
    def _stacked(self) -> Block:
        width = max(map(len, self._blocks))
        rows = [_block(self.cardinalities, block, width) for block in self._blocks]
        return Block(*(torch.cat(column) for column in zip(*rows)))

    @property
    def evaluations(self) -> int:
        """Rows of the density a chain's sweep takes."""
        if self.scan == "random":
            return len(self._blocks) * (max(self._states) - 1)
        return sum(self._states) - len(self._blocks)

    def init(self, position: Tensor, target: DiscreteDensity) -> GibbsState:
        """The state at `position` `[C, m]`."""
        return GibbsState(position, target(position))

    def step(
        self, state: GibbsState, tuning: Tuning | None, target: DiscreteDensity
    ) -> tuple[GibbsState, Info]:
        """One sweep."""
        device = state.position.device
        if self.scan == "systematic":
            for block, states in zip(self._single, self._states, strict=True):
                state = _draw(state, _to(block, device), states, False, target)
        else:
            stacked, ragged = _to(self._stacked, device), len(set(self._states)) > 1
            order = torch.rand(len(state.position), len(self._blocks), device=device).argsort(1)
            for column in order.unbind(1):
                block = Block(*(table[column] for table in stacked))
                state = _draw(state, block, max(self._states), ragged, target)
        return state, report(torch.ones_like(state.log_density), state.log_density, self.evaluations)


def _draw(state: GibbsState, block: Block, states: int, ragged: bool, target: DiscreteDensity) -> GibbsState:
    """Draw one block from its conditional. Codes count from the present one, so that entry 0 is to stay.

    `states` is the number of its values; with `ragged`, the most that any has.
    """
    z, present = state
    if states == 1:
        return state
    code = block.code(z)
    others = (code + torch.arange(1, states, device=z.device)) % block.states
    tried = block.assign(z, others).flatten(0, 1)
    log_density = target(tried).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    if states == 2 and not ragged:  # change or stay
        change = torch.rand_like(present).logit() < log_density - present
        return where(change, GibbsState(tried, log_density), state)
    log_density = torch.cat([present.unsqueeze(1), log_density.reshape(others.shape)], 1)
    if ragged:  # what lies past the last value of this block was tried to fill the row
        past = torch.arange(states, device=z.device) >= block.states
        log_density = log_density.masked_fill(past, -math.inf)
    pick = pick_of(log_density.softmax(1))
    z = block.assign(z, (code + pick) % block.states).squeeze(1)
    return GibbsState(z, log_density.gather(1, pick).squeeze(1))


def _block(cardinalities: tuple[int, ...], block: tuple[int, ...], width: int) -> Block:
    """The tables of one block, filled to `width` by naming its first variable again."""
    size = [cardinalities[i] for i in block]
    stride = [math.prod(size[j + 1 :]) for j in range(len(size))]
    fill = width - len(block)
    rows = (
        [*block, *[block[0]] * fill],
        [*stride, *[0] * fill],
        [*stride, *[stride[0]] * fill],
        [*size, *[size[0]] * fill],
    )
    index, weight, stride_, size_ = (torch.tensor([row]) for row in rows)
    return Block(index, weight, stride_, size_, torch.tensor([[math.prod(size)]]))


def _to(block: Block, device: torch.device) -> Block:
    return Block(*(table.to(device) for table in block))


# --- gradients for many variables ---


class RelaxedState(NamedTuple):
    """Indices `[C, m]`, the log density there `[C]` and its gradient by the one-hot code `[C, m, K]`."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class GibbsWithGradients:
    r"""Change one variable, chosen by a first-order estimate of what every change is worth; Metropolis-corrected.

    .. math:: q(z_i \leftarrow k) \propto \exp(d_{ik} / 2), \qquad d_{ik} = g_{ik} - g_{i z_i}

    with g the gradient by the one-hot code. It costs one gradient whatever m is, and where the density is nearly
    linear in each variable (Ising and Potts models, Boltzmann machines) almost everything is accepted. To stay is a
    proposal as well, of weight one in all: without it some chains only ever alternate.

    Args:
        cardinalities: number of values of each of the m variables.
        moves: proposals per step.
        dtype: of the one-hot code that the density is given; torch's default if None.

    Raises:
        ValueError: a cardinality is below 1, or there are no moves.
    """

    cardinalities: tuple[int, ...]
    moves: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_cardinalities(self.cardinalities)
        if self.moves < 1:
            raise ValueError(f"moves must be at least 1, got {self.moves}")

    def init(self, position: Tensor, target: RelaxedDensity) -> RelaxedState:
        """The state at `position` `[C, m]`."""
        return RelaxedState(position, *target(one_hot(position, self.cardinalities, self.dtype)))

    def step(
        self, state: RelaxedState, tuning: Tuning | None, target: RelaxedDensity
    ) -> tuple[RelaxedState, Info]:
        """`moves` proposals."""
        values = max(self.cardinalities)
        accept = torch.zeros_like(state.log_density)
        logits = self._logits(state.position, state.gradient)
        for _ in range(self.moves):
            z, log_density, _ = state
            pick = pick_of(logits.exp())  # [C, 1]: i K + k
            variable, value = pick // values, pick % values
            back = variable * values + z.gather(1, variable)
            new = z.scatter(1, variable, value)
            new_density, new_gradient = target(one_hot(new, self.cardinalities, self.dtype))
            new_logits = self._logits(new, new_gradient)
            forth, home = logits.gather(1, pick).squeeze(1), new_logits.gather(1, back).squeeze(1)
            gain = gained(new_density + home, log_density + forth)
            taken = torch.rand_like(gain).log() < gain
            state = where(taken, RelaxedState(new, new_density, new_gradient), state)
            logits = torch.where(taken.unsqueeze(1), new_logits, logits)
            accept = accept + gain.clamp(max=0.0).exp() / self.moves
        return state, report(accept, state.log_density, self.moves)

    def _logits(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Log probabilities of all proposals, `[C, m K]`. All m ways to stay weigh 1 / m each."""
        present = z.unsqueeze(2)
        half = (gradient - gradient.gather(2, present)) / 2
        half = half.scatter(2, present, -math.log(len(self.cardinalities)))
        if len(set(self.cardinalities)) > 1:
            half = half.masked_fill(outside(self.cardinalities, z.device), -math.inf)
        return half.flatten(1).log_softmax(1)


# --- small parts ---


def pick_of(probabilities: Tensor) -> Tensor:
    """A draw from each row of `[..., K]`, `[..., 1]`, by one uniform number; 0 where no entry is a possible one."""
    ends = probabilities.cumsum(-1)
    last = ends[..., -1:]
    return (ends <= torch.rand_like(last) * last).sum(-1, keepdim=True).clamp(max=ends.shape[-1] - 1)


def one_hot(z: Tensor, cardinalities: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """The code of indices `[C, m]`: `[C, m, K]`."""
    dtype = dtype or torch.get_default_dtype()
    zeros = torch.zeros(*z.shape, max(cardinalities), dtype=dtype, device=z.device)
    return zeros.scatter(2, z.unsqueeze(2), 1.0)


def outside(cardinalities: tuple[int, ...], device: torch.device) -> Tensor:
    """`[m, K]`: which entries of the one-hot code are no value of their variable."""
    sizes = torch.tensor(cardinalities, device=device)
    return torch.arange(max(cardinalities), device=device) >= sizes.unsqueeze(1)


def report(accept: Tensor, log_density: Tensor, evaluations: int) -> Info:
    """What a step of a discrete kernel tells."""
    never = torch.zeros_like(accept, dtype=torch.bool)
    return Info(accept, -log_density, never, torch.full_like(accept, evaluations))


def check_cardinalities(cardinalities: tuple[int, ...]) -> None:
    """Raise a ValueError unless every variable has a value."""
    if not cardinalities or min(cardinalities) < 1:
        raise ValueError(
            f"cardinalities are the numbers of values, at least 1 each, of one variable or more; got {cardinalities}"
        )
