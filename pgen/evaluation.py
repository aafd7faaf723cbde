"""The ways to compute a density: recorded for all vectors at once, recorded for one, or as the program is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record import Recorded, Unrecordable, where_raised
from pgen.density import Density, stacked


@dataclass(frozen=True)
class Functions:
    """What samplers call, by the fastest way that the program allows.

    Attributes:
        target: from vectors `[C, d]` to log densities `[C]` and gradients `[C, d]`.
        values: from vectors `[n, d]` to values by site, `[n, *shape]`.
        way: "recorded" (all vectors at once), "in turn" (recorded for one vector), "unrecorded" (all at once), or "as
            written" (one after the other, the program itself).
        why: why it is no better one.
        cost: operations of one call of `target`, and numbers computed for each vector, where it is recorded.
    """

    target: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor], dict[str, Tensor]]
    way: str
    why: str = ""
    cost: tuple[int, float] = (0, 0.0)


def functions_of(density: Density, *, rows: int = 32, recorded: bool = True, lift: bool = True) -> Functions:
    """The density as kernels take it.

    Args:
        density: of a program.
        rows: vectors to try it on: as many as there will be, where that is known, so that one recording does.
        recorded: replay a recording, instead of running the program each time.
        lift: compute in double precision, whatever precision the program is written in.
    """
    device = density.problem.device
    dtype = torch.float64 if lift else density.dtype
    some = torch.zeros(rows, density.size, dtype=dtype, device=device)
    try:
        if not recorded:
            density.value_and_gradient(some.to(density.dtype))
            together = _cast(density.value_and_gradient, density.dtype)
            values = partial(_chunked, _cast(density.values, density.dtype), rows)
            return Functions(together, values, "unrecorded")
        together = Recorded(density.value_and_gradient, lift=lift, fallback=False)
        values = Recorded(density.values, lift=lift, fallback=False)
        together(some)
        return Functions(together, partial(_chunked, values, rows), "recorded", cost=_cost(together, some))
    except (Unrecordable, RuntimeError) as error:
        where = where_raised(error.__traceback__)
        why = str(error).splitlines()[0] + (f" (at {where})" if where and where not in str(error) else "")
    one = some[0]
    try:
        if recorded:
            alone = Recorded(density.alone, lift=lift, fallback=False)
            value = Recorded(density.value, lift=lift, fallback=False)
            alone(one)
            value(one)
            return Functions(partial(stacked, alone), partial(_each, value), "in turn", why)
    except Unrecordable as error:
        why = str(error)
    target = _cast(density.one_by_one, density.dtype)
    return Functions(target, partial(_each, _cast(density.value, density.dtype)), "as written", why)


def _cast(fn: Callable[[Tensor], Any], dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """A function of positions in the program's own precision, its numbers given back in that of the positions."""

    def cast(positions: Tensor) -> Any:
        found = fn(positions.to(dtype))
        if isinstance(found, dict):
            return {k: v.to(positions.dtype) if v.is_floating_point() else v for k, v in found.items()}
        return tuple(v.to(positions.dtype) for v in found)

    return cast


def _cost(recorded: Recorded[..., Any], positions: Tensor) -> tuple[int, float]:
    """Operations, and numbers per vector: a product of matrices counts a number for every 16 multiplications."""
    tape = next(r.tape for r in recorded.recordings.values() if r is not None)
    values = tape.run([positions])
    total = 0.0
    for op in tape.ops:
        numbers = sum(values[i].numel() for i in op.gives())
        total += numbers
        if op.name in ("aten.mm.default", "aten.bmm.default", "aten.addmm.default"):
            total += numbers * values[op.reads()[-2]].shape[-1] / 16
    return len(tape.ops), total / len(positions)


def _each(value: Callable[[Tensor], dict[str, Tensor]], positions: Tensor) -> dict[str, Tensor]:
    found = [value(position) for position in positions]
    return {name: torch.stack([f[name] for f in found]) for name in found[0]}


def _chunked(
    values: Callable[[Tensor], dict[str, Tensor]], size: int, positions: Tensor
) -> dict[str, Tensor]:
    """In pieces of one size, so that one recording serves any number and memory stays bounded."""
    n = len(positions)
    found = [values(part) for part in in_parts(positions, size)]
    return {name: torch.cat([f[name] for f in found])[:n] for name in found[0]}


def in_parts(positions: Tensor, size: int) -> Sequence[Tensor]:
    """Vectors `[n, d]` as pieces `[size, d]`; the first one fills up the last piece."""
    lacking = -len(positions) % size
    whole = torch.cat([positions, positions[:1].expand(lacking, -1)]) if lacking else positions
    return [part.contiguous() for part in whole.split(size)]
