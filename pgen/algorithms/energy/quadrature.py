r"""Integrals over one, two or three numbers: the log of a partition function to many digits.

The trapezoid rule on a tensor grid, in unconstrained coordinates q with the volume of the change, after

.. math:: q = c + s \sinh t

in which steps are even in t. For a smooth density that falls off towards the ends, the rule converges faster than any power of
the number of nodes; the hyperbolic sine makes it so for heavy tails too, and is the identity for light ones.

Where the mass lies is found first, without gradient: on a grid that reaches from 1e-8 to 1e8 on a logarithmic scale, then on
ever smaller boxes around what is not negligible. Discrete numbers beside the measured ones are summed over. In two dimensions a
peak narrower than a 200th of the box may be missed, in three one narrower than a 50th.

References:
    The Exponentially Convergent Trapezoidal Rule (Trefethen & Weideman, SIAM Review 56, 2014). Quadrature formulas by
    variable transformation (Takahasi & Mori, Numerische Mathematik 21, 1973).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from pgen.algorithms.energy.space import Part, Space
from pgen.algorithms.energy.sums import BLOCK, log_sum

DROP = 36.0
"""Nats below the highest cell at which a cell holds nothing: e^-36 of it, below the rounding of doubles."""

REACH, BOUNDED = 1e8, 80.0
"""How far the first grid reaches, and where coordinates are those of a bounded support: e^80 is still a single number."""

_NODES = {1: 2049, 2: 257, 3: 65}


class Integral(NamedTuple):
    """What quadrature gives, `[]` each, or `[laws]`.

    Attributes:
        log_z: in nats, double precision, differentiable in what the density holds.
        error: how far the same rule with every second node is from it: far above the error of `log_z` where the density is
            smooth, about as large where it has steps.
    """

    log_z: Tensor
    error: Tensor


class Grid(NamedTuple):
    """Nodes `q = centre + scale sinh(t)`.

    Attributes:
        low: of t, `[d]`.
        high: of t, `[d]`.
        centre: `[d]`.
        scale: `[d]`.
        nodes: along each number, odd.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    scale: Tensor
    nodes: int

    def node(self, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates `[R, d]`, their logged weights `[R]` and whether every second node has them, of numbers `[R]`."""
        size = len(self.low)
        power = self.nodes ** torch.arange(size - 1, -1, -1, device=code.device)
        place = code.unsqueeze(1) // power % self.nodes
        step = (self.high - self.low) / (self.nodes - 1)
        t = self.low + place * step
        log_cosh = t.abs() + F.softplus(-2 * t.abs()) - math.log(2)
        weight = (self.scale.log() + step.log() + log_cosh).sum(1)
        return self.centre + self.scale * t.sinh(), weight, (place % 2 == 0).all(1)


def quadrature(
    log_density: Callable[[Tensor], Tensor],
    space: Space,
    like: Tensor,
    *,
    tolerance: float = 1e-4,
    most: int = 2**22,
    block: int = BLOCK,
    laws: int | None = None,
) -> Integral:
    """The log partition function of one to three measured numbers, and any counted ones.

    Args:
        log_density: f, rows `[R, *event]` to `[R]`.
        space: its values.
        like: gives the type and device of the values; sums are in double precision whatever it is.
        tolerance: nodes are doubled until the error is below it.
        most: values of f that may be asked for, of each law.
        block: values that are asked for together.
        laws: how many densities f holds, row i being of the one numbered i mod `laws`. All have one grid.

    Raises:
        ValueError: too many numbers, or a density that has no finite integral as far as can be seen.

    Example:
        >>> from torch.distributions import constraints
        >>> space = Space.of(constraints.real, (1,))
        >>> found = quadrature(lambda x: -x.square().sum(-1) / 2, space, torch.zeros((), dtype=torch.float64))
        >>> round(float(2 * found.log_z.exp().square()), 8)  # 4 pi
        12.56637061
    """
    with torch.no_grad():
        grid = grid_of(log_density, space, like, tolerance=tolerance, most=most, block=block, laws=laws or 1)
    found = integral(log_density, space, grid, like, block=block, laws=laws or 1)
    return Integral(found.log_z[0], found.error[0]) if laws is None else found


def integral(
    log_density: Callable[[Tensor], Tensor],
    space: Space,
    grid: Grid,
    like: Tensor,
    *,
    block: int = BLOCK,
    laws: int = 1,
) -> Integral:
    """The sums over a grid that is known, `[laws]`; straight-line code."""
    size, states = len(grid.low), math.prod(space.cardinalities)

    def terms(code: Tensor) -> Tensor:
        q, weight, even = grid.node(code // states)
        term = _density(log_density, space, q, code % states, like, laws) + weight.unsqueeze(1)
        coarse = torch.where(even.unsqueeze(1), term.detach() + size * math.log(2), -_HUGE)
        return torch.cat([term, coarse], 1)

    both = log_sum(terms, states * grid.nodes**size, like.device, max(1, block // laws))
    return Integral(both[:laws], (both[:laws] - both[laws:]).detach().abs())


def grid_of(
    log_density: Callable[[Tensor], Tensor],
    space: Space,
    like: Tensor,
    *,
    tolerance: float = 1e-4,
    most: int = 2**22,
    block: int = BLOCK,
    laws: int = 1,
) -> Grid:
    """Where the mass lies, and how many nodes it takes."""
    size, states = space.dims, math.prod(space.cardinalities)
    if size not in _NODES or states * 2 * _NODES[size] ** size > most:
        raise ValueError(
            f"quadrature integrates 1 to 3 numbers with few discrete states beside them; got {size} numbers and {states} "
            "states: estimate by annealed importance sampling"
        )
    grid = _box(log_density, space, like, max(1, block // laws), laws)
    while True:
        finer = grid._replace(nodes=2 * grid.nodes - 1)
        found = integral(log_density, space, grid, like, block=block, laws=laws)
        if not bool(found.log_z.isfinite().all()):
            raise ValueError("the log density is not a number, or infinite, within the range of its mass")
        if bool(found.error.max() < tolerance) or states * finer.nodes**size > most:
            return grid
        grid = finer


# --- where the mass lies ---

_HUGE = 1e300


def _density(
    log_density: Callable[[Tensor], Tensor], space: Space, q: Tensor, state: Tensor, like: Tensor, laws: int
) -> Tensor:
    """Of every law at every place, `[R, laws]`."""
    q = q.to(like.dtype)
    x = space.numbered(state, like, q).repeat_interleave(laws, 0)
    value = log_density(x).reshape(len(q), laws) + space.volume(q).unsqueeze(1)
    return value.double().nan_to_num(nan=math.nan, posinf=math.inf, neginf=-_HUGE)


def _box(log_density: Callable[[Tensor], Tensor], space: Space, like: Tensor, block: int, laws: int) -> Grid:
    """A grid that holds all but e^-36 of the mass of every law, centred on its median."""
    size, states = space.dims, math.prod(space.cardinalities)
    one = torch.ones(size, dtype=torch.float64, device=like.device)
    reach = torch.cat([_reach(part) * one[: space.free(part)] for part in space.measured]).asinh()
    grid = Grid(-reach, reach, 0 * one, one, _NODES[size])
    code = torch.arange(grid.nodes**size, device=like.device)
    mass = code.new_zeros(0).double()
    for attempt in range(40):
        cells = list[Tensor]()
        for part in code.split(max(1, block // states)):
            q, weight, _ = grid.node(part)
            state = torch.arange(states, device=like.device).repeat(len(part))
            value = _density(log_density, space, q.repeat_interleave(states, 0), state, like, laws)
            # Far out a density may overflow. What is not a number within the mass is found when it is integrated.
            value = value.nan_to_num(nan=-_HUGE).clamp_max(_HUGE).reshape(len(part), states, laws)
            cells.append(value.logsumexp(1) + weight.unsqueeze(1))
        each = torch.cat(cells)
        mass = (each - each.amax(0)).amax(1).reshape([grid.nodes] * size)
        if attempt == 0:
            _check_ends(mass)
        held = _hopeful(mass) > -DROP
        low, high = grid.low.clone(), grid.high.clone()
        step = (grid.high - grid.low) / (grid.nodes - 1)
        for axis in range(size):
            places = held.movedim(axis, 0).reshape(grid.nodes, -1).any(1).nonzero()
            low[axis] += step[axis] * (places.min() - 1).clamp_min(0)
            high[axis] -= step[axis] * (grid.nodes - 2 - places.max()).clamp_min(0)
        if bool(((high - low) / (grid.high - grid.low)).min() > 0.8):
            break
        grid = grid._replace(low=low, high=high)
    return _centred(grid, mass.exp())


def _reach(part: Part) -> float:
    return REACH if part.constraint is constraints.real else BOUNDED


def _check_ends(mass: Tensor) -> None:
    for axis in range(mass.dim()):
        ends = mass.movedim(axis, 0)[[0, -1]]
        if bool((ends > -12).any()):
            raise ValueError(
                f"the density does not fall off along coordinate {axis}: at the far end it is within 12 nats of its "
                "highest (in logarithmic cells), so that no integral is in sight; tilt a base that does fall off, or have the "
                "energy grow"
            )


def _hopeful(mass: Tensor) -> Tensor:
    """Cells, those that are higher than all neighbours raised by as much again: a narrow peak may lie between nodes."""
    wide = F.pad(mass[None, None], (1, 1) * mass.dim(), value=-_HUGE)[0, 0]
    peak, bump = torch.ones_like(mass, dtype=torch.bool), torch.zeros_like(mass)
    for axis in range(mass.dim()):
        inner = wide
        for other in range(mass.dim()):
            if other != axis:
                inner = inner.narrow(other, 1, mass.shape[other])
        for start in (0, 2):
            beside = inner.narrow(axis, start, mass.shape[axis])
            peak = peak & (mass >= beside)
            bump = torch.maximum(bump, (mass - beside).nan_to_num(nan=0.0))
    return torch.where(peak & (mass > -_HUGE / 2), mass + bump, mass)


def _centred(grid: Grid, mass: Tensor) -> Grid:
    """The same box, its nodes densest where the mass is."""
    size = mass.dim()
    centre, scale = grid.centre.clone(), grid.scale.clone()
    t = torch.linspace(0, 1, grid.nodes, dtype=torch.float64, device=mass.device).unsqueeze(1)
    q = grid.centre + grid.scale * torch.lerp(grid.low, grid.high, t).sinh()
    for axis in range(size):
        share = mass.movedim(axis, 0).reshape(grid.nodes, -1).sum(1)
        share = share / share.sum()
        middle = int((share.cumsum(0) < 0.5).sum())
        at = q[:, axis]
        centre[axis] = at[middle]
        # A scale that heavy tails have too, and that two modes far apart make a long one.
        half = (share * (at - at[middle]).abs().sqrt()).sum().square()
        scale[axis] = torch.maximum(half, (at[1:] - at[:-1])[max(middle - 1, 0)])
    low, high = ((grid.centre + grid.scale * end.sinh() - centre) / scale for end in (grid.low, grid.high))
    return Grid(low.asinh(), high.asinh(), centre, scale, grid.nodes)
