r"""Gibbs and Metropolis moves of many discrete variables at once, by the parts of the density that each one meets.

A log density that is a sum of terms says which variables matter to each other: those that share a term. The others are
independent given the rest, and are drawn in the same breath:

    colour     variables of one colour share no term, so each term belongs to at most one of them
    try        every value of all of them at once, the k-th of one beside the k-th of the others
    add        the terms that belong to each:  log π(z_i = k | rest) = Σ_t∋i terms_t(z_i = k) + constant
    draw       all of them, each from its own conditional

A chessboard of spins takes two colours, whatever its size; a chain two; variables that all meet in one term as many as
there are. Variables without a list of values (counts) are moved by symmetric steps of whole numbers, and each is taken
or left by its own terms (Metropolis).

The density is `terms(q, z [C, J, m]) -> [C, J, T]` at J joint values for each of C chains; q is whatever it depends on
besides. A term of -inf forbids.

References:
    Stochastic Relaxation, Gibbs Distributions, and the Bayesian Restoration of Images (Geman & Geman, IEEE PAMI
    1984). Parallel Gibbs Sampling: From Colored Fields to Thin Junction Trees (Gonzalez, Low, Gretton & Guestrin,
    AISTATS 2011). Equation of State Calculations by Fast Computing Machines (Metropolis et al., J. Chem. Phys. 1953).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.elimination import colouring, moral_neighbours
from pgen.algorithms.kernels.gibbs import pick_of
from pgen.algorithms.kernels.iterate import Wrap, unwrapped

Terms = Callable[[Any, Tensor], Tensor]

ENDLESS = 0  # the number of values of a variable that has no list of them


class LocalState(NamedTuple):
    """Where the chains are: values `[C, m]`, and the terms there `[C, T]`."""

    position: Tensor
    terms: Tensor

    @property
    def log_density(self) -> Tensor:
        """`[C]`."""
        return self.terms.sum(1)


class Group(NamedTuple):
    """Variables of one colour and one number of values, filled up to a common length so that one recording serves many.

    Attributes:
        members: `[g]`; which variables; m where there is none.
        owner: `[T]`; the place in `members` that a term belongs to; g where it belongs to none of them.
    """

    members: Tensor
    owner: Tensor


@dataclass(frozen=True)
class LocalGibbs:
    r"""Draw each variable from its conditional, all variables of one colour at once.

    Args:
        cardinalities: number of values of each of the m variables, which are then 0..K-1; 0 for one without end, whose
            values are whole numbers.
        scopes: for each of the T terms, the variables that it may depend on. To name more than there are is right and
            slow; to leave one out is wrong.

    Raises:
        ValueError: a cardinality below 0, no variable at all, or a scope that names an unknown one.

    Example:
        A chain of three spins, coupled: the outer ones are drawn at once.

        >>> kernel = LocalGibbs((2, 2, 2), ((0, 1), (1, 2)))
        >>> terms = lambda q, z: 3.0 * (z[..., 1:] == z[..., :-1])
        >>> kernel.colours
        ((0, 2), (1,))
        >>> _ = torch.manual_seed(0)
        >>> state = kernel.init(torch.zeros(1000, 3, dtype=torch.long), terms)
        >>> for _ in range(20):
        ...     state, _ = kernel.sweep(state, None, terms)
        >>> bool(((state.position[:, 0] == state.position[:, 2]).double().mean() - 0.909).abs() < 0.05)
        True
    """

    cardinalities: tuple[int, ...]
    scopes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check that the scopes are about the variables."""
        count = len(self.cardinalities)
        if not count or min(self.cardinalities) < 0:
            raise ValueError(
                "cardinalities are numbers of values, at least 1 each, or 0 for a variable without end; got "
                f"{self.cardinalities}"
            )
        odd = next((s for s in self.scopes if any(not 0 <= i < count for i in s)), None)
        if odd is not None:
            raise ValueError(f"scopes name variables 0..{count - 1}; got {odd}")

    @cached_property
    def colours(self) -> tuple[tuple[int, ...], ...]:
        """Variables that are moved at once: of one colour, and with as many values."""
        scopes = [(i,) for i in range(len(self.cardinalities))] + sorted(
            {s for s in self.scopes if len(s) > 1}
        )
        if any(len(set(s)) == len(self.cardinalities) for s in scopes):  # all meet
            colours = {i: i for i in range(len(self.cardinalities))}
        else:
            colours = colouring(moral_neighbours(scopes))
        groups: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(self.cardinalities):
            if size != 1:
                groups.setdefault((colours[i], size), []).append(i)
        return tuple(tuple(group) for group in groups.values())

    @cached_property
    def _groups(self) -> tuple[tuple[int, Group], ...]:
        count = len(self.cardinalities)
        terms: list[list[int]] = [[] for _ in range(count)]
        for t, scope in enumerate(self.scopes):
            for i in scope:
                terms[i].append(t)
        found = []
        for group in self.colours:
            length = 1 << (len(group) - 1).bit_length()
            members = torch.tensor([*group, *[count] * (length - len(group))])
            owner = torch.full((len(self.scopes),), length)
            for place, i in enumerate(group):
                owner[terms[i]] = place
            found.append((self.cardinalities[group[0]], Group(members, owner)))
        return tuple(found)

    @cached_property
    def endless(self) -> Tensor:
        """`[m]`; which variables have no list of values."""
        return torch.tensor([size == ENDLESS for size in self.cardinalities])

    @property
    def evaluations(self) -> int:
        """Rows of terms that a chain's sweep takes."""
        return sum(max(1, size - 1) for size, _ in self._groups)

    def init(self, position: Tensor, target: Terms, q: Any = None) -> LocalState:
        """The state at values `[C, m]`."""
        return LocalState(position, number(target(q, position.unsqueeze(1)).squeeze(1)))

    def sweep(
        self, state: LocalState, widths: Tensor | None, target: Terms, q: Any = None, wrap: Wrap = unwrapped
    ) -> tuple[LocalState, Tensor]:
        """Move every variable once.

        Args:
            state: where the chains are, its terms those at q.
            widths: `[m]`; the longest step of a variable without end; None: 1.
            target: the terms.
            q: what they depend on besides.
            wrap: makes a straight-line function fast; it is called for as many as there are kinds of groups.

        Returns:
            the state, and how often proposals of each variable were accepted, over the chains, `[m]`; 1 for those that are
            drawn.
        """
        z, terms = state
        device = z.device
        accept = torch.ones_like(z[0], dtype=terms.dtype)
        for group, (size, (members, owner)) in zip(self.colours, self._groups, strict=True):
            members, owner = members.to(device), owner.to(device)
            filled = len(members) > len(group)
            if size == ENDLESS:
                width = torch.ones_like(z[0]) if widths is None else widths
                width = torch.cat([width.to(terms), terms.new_ones(1)])[members]
                z, terms, taken = wrap(Step(target, filled))(q, z, terms, members, owner, width)
                accept = torch.cat([accept, accept[:1]]).index_copy(0, members, taken)[:-1]
            else:
                z, terms = wrap(Draw(target, size, filled))(q, z, terms, members, owner)
        return LocalState(z, terms), accept

    def impossible(self, position: Tensor, terms: Tensor) -> Tensor:
        """Which variables of `position` `[C, m]` meet a term `[C, T]` that is no finite number, `[C, m]`."""
        bad = ~terms.isfinite()
        found = torch.zeros_like(position, dtype=torch.bool)
        for group, (_, (_, owner)) in zip(self.colours, self._groups, strict=True):
            owner = owner.to(bad.device)
            counts = terms.new_zeros(len(bad), int(owner.max()) + 1 if len(owner) else 1)
            counts = counts.index_add(1, owner, bad.to(terms.dtype))
            found[:, list(group)] = counts[:, : len(group)] > 0
        return found

    def log_conditionals(self, state: LocalState, target: Terms, q: Any = None) -> list[Tensor]:
        """Log probabilities of the values of the variables of each colour with a list of them, `[C, K, g]`."""
        found = []
        for group, (size, (members, owner)) in zip(self.colours, self._groups, strict=True):
            if size != ENDLESS:
                _, tried = _tried(state.position, members, torch.arange(size), size, True)
                logits = _summed(number(target(q, tried)), owner, len(members))
                shift = state.position[:, list(group)].unsqueeze(1) + torch.arange(size)[:, None]
                logits = logits[..., : len(group)].log_softmax(1)
                found.append(torch.zeros_like(logits).scatter(1, shift % size, logits))
        return found


@dataclass(frozen=True)
class Draw:
    """Draw the variables of one group, of `size` values each, from their conditionals; straight-line code.

    Values are counted from the present one, so that the first is to stay.
    """

    target: Terms
    size: int
    filled: bool = False

    def __call__(
        self, q: Any, z: Tensor, terms: Tensor, members: Tensor, owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New values and terms."""
        shifts = torch.arange(1, self.size, device=z.device)
        here, tried = _tried(z, members, shifts, self.size, self.filled)
        found = number(self.target(q, tried))  # [C, K - 1, T]
        if self.size == 2:
            gain = _summed(found[:, 0] - terms, owner, len(members))
            change = torch.rand_like(gain).logit() < gain  # false where the gain is no number
            z = _placed(z, members, (here + change) % 2, self.filled)
            return z, torch.where(_behind(change)[:, owner], found[:, 0], terms)
        every = torch.cat([terms.unsqueeze(1), found], 1)  # [C, K, T]
        logits = _summed(every, owner, len(members))
        pick = pick_of(logits.transpose(1, 2).softmax(2)).squeeze(2)  # [C, g]
        z = _placed(z, members, (here + pick) % self.size, self.filled)
        return z, every.gather(1, _behind(pick)[:, owner].unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class Step:
    """Move the variables of one group by whole numbers, uniform on -width..-1 and 1..width; straight-line code."""

    target: Terms
    filled: bool = False

    def __call__(
        self, q: Any, z: Tensor, terms: Tensor, members: Tensor, owner: Tensor, width: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New values and terms, and mean acceptances `[g]`. The proposal is symmetric: the ratio is that of the densities."""
        here = _behind(z)[:, members] if self.filled else z[:, members]
        length = 1 + torch.floor(torch.rand_like(here, dtype=terms.dtype) * width.floor().clamp(min=1.0))
        proposal = here + (length * torch.sign(torch.rand_like(length) - 0.5)).to(z.dtype)
        tried = _placed(z, members, proposal, self.filled)
        found = number(self.target(q, tried.unsqueeze(1)).squeeze(1))
        gain = _summed(found - terms, owner, len(members))
        taken = torch.rand_like(gain).log() < gain
        z = _placed(z, members, torch.where(taken, proposal, here), self.filled)
        accept = gain.clamp(max=0.0).exp().nan_to_num().mean(0)
        return z, torch.where(_behind(taken)[:, owner], found, terms), accept


def number(terms: Tensor) -> Tensor:
    """Terms with -inf in place of what is no density: no other term can make up for it."""
    return terms.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _tried(z: Tensor, members: Tensor, shifts: Tensor, size: int, filled: bool) -> tuple[Tensor, Tensor]:
    """Present values `[C, g]` of the members, and z with all of them shifted by each of J shifts `[C, J, m]`."""
    padded = _behind(z) if filled else z
    here = padded[:, members]
    values = (here.unsqueeze(1) + shifts[:, None]) % size
    rows = padded.unsqueeze(1).expand(-1, len(shifts), -1).index_copy(2, members, values)
    return here, rows[..., :-1] if filled else rows


def _placed(z: Tensor, members: Tensor, values: Tensor, filled: bool) -> Tensor:
    """`z` `[C, m]` with the members set; those that only fill up are dropped."""
    return _behind(z).index_copy(1, members, values)[:, :-1] if filled else z.index_copy(1, members, values)


def _behind(values: Tensor) -> Tensor:
    """`[C, n]` with a column of zeros behind: that of no variable."""
    return torch.cat([values, torch.zeros_like(values[:, :1])], 1)


def _summed(terms: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums over the terms of each member: `[..., T]` to `[..., g]`."""
    zeros = terms.new_zeros(*terms.shape[:-1], count + 1)
    return zeros.index_add(-1, owner, terms)[..., :-1]
