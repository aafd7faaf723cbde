"""Sums over everything that a finite space holds: the log of a partition function, exactly, in bounded memory.

    log Z = log sum_x exp f(x)

The sum goes block by block. Where it is to be differentiated and there are several blocks, each is evaluated once more on the
way back, so that the graph of only one is ever held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pgen.algorithms.energy.space import Space

BLOCK = 2**15
"""Rows that are evaluated together."""


def enumerated(
    log_density: Callable[[Tensor], Tensor],
    space: Space,
    like: Tensor,
    block: int = BLOCK,
    laws: int | None = None,
) -> Tensor:
    """The log partition function of a finite space, `[]`, in double precision; differentiable in what f holds.

    Args:
        log_density: f, rows `[R, *event]` to `[R]`.
        space: all of it counted; some 2^22 values are a matter of seconds.
        like: gives the type and device of the values.
        block: rows that are evaluated together.
        laws: how many densities f holds, row i being of the one numbered i mod `laws`; then the result is `[laws]`.

    Raises:
        ValueError: the space has measured numbers (`quadrature` integrates up to three).

    Example:
        Three bits that are one with probability 1/2 each.

        >>> from torch.distributions import constraints
        >>> space = Space.of(constraints.boolean, (3,))
        >>> enumerated(lambda x: x.new_zeros(len(x)), space, torch.zeros(())).exp()
        tensor(8.0000, dtype=torch.float64)
    """
    if space.dims:
        raise ValueError(
            f"{space.dims} numbers are measured; enumerated() sums counted ones, quadrature() integrates"
        )
    each = 1 if laws is None else laws

    def terms(code: Tensor) -> Tensor:
        x = space.numbered(code, like).repeat_interleave(each, 0)
        return log_density(x).reshape(len(code), each)

    found = log_sum(terms, space.states, like.device, max(1, block // each))
    return found[0] if laws is None else found


def log_sum(
    terms: Callable[[Tensor], Tensor], count: int, device: torch.device, block: int = BLOCK
) -> Tensor:
    """Log of a sum of exponentials, `[]` (`[k]` where a term is `[k]`), in double precision.

    Args:
        terms: numbers of terms `[R]` to their logs `[R]` or `[R, k]`.
        count: terms are numbered 0 to count - 1.
        device: of the numbers.
        block: terms that are evaluated together.
    """

    def part(start: int, stop: int) -> Tensor:
        return terms(torch.arange(start, stop, device=device)).double().logsumexp(0)

    if count <= block:
        return part(0, count)
    parts = list[Tensor]()
    for start in range(0, count, block):
        stop = min(start + block, count)
        if torch.is_grad_enabled():
            parts.append(checkpoint(part, start, stop, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(part(start, stop))
    return torch.stack(parts).logsumexp(0)
