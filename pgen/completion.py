"""Values that are missing in part, drawn given the rest: at laws that know their own conditionals, as an energy does.

Rows that lack the same numbers go together; what is missing is then one more latent site, which a backend draws as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pgen.draws import Draws
from pgen.errors import DataError
from pgen.handlers import missing_in_part, whole
from pgen.problem import Data, Problem
from pgen.structure import Structure

Ask = Callable[[Data], tuple[Problem, Structure]]
Draw = Callable[[Problem, Structure, int], Draws]


def lacking(structure: Structure, data: Data) -> tuple[str, ...]:
    """Sites whose values are missing in part in the data, and whose laws know how to go on."""
    if not isinstance(data, Mapping):
        return ()
    sites = [structure.sites[k] for k in data if k in structure.sites]
    return tuple(
        s.name
        for s in sites
        if s.completes and missing_in_part(torch.as_tensor(data[s.name]), len(s.event_shape))
    )


def completed(structure: Structure, data: Mapping[str, Any], n: int, ask: Ask, draw: Draw) -> Draws:
    """Draws of all latents, and of the sites that are lacking: whole values.

    Args:
        structure: of the program.
        data: with NaN where something is missing.
        n: draws.
        ask: makes the problem, what is missing being latent, and its structure.
        draw: draws the latents of it.

    Raises:
        DataError: rows lack different numbers, and are not independent.
    """
    names = lacking(structure, data)
    tensors = {key: torch.as_tensor(value) for key, value in data.items()}
    rows = len(tensors[names[0]])
    gone = torch.cat([tensors[name].isnan().reshape(rows, -1) for name in names], 1)
    patterns, which = gone.unique(dim=0, return_inverse=True)
    if len(patterns) > 1 and (
        structure.tied
        or any(not structure.local(name) or value.shape[:1] != (rows,) for name, value in tensors.items())
    ):
        raise DataError(
            f"{names[0]!r} lacks other numbers in other rows ({len(patterns)} patterns of NaN), and rows are not independent; "
            "expected the same in all rows, or rows that share no latent"
        )
    parts: list[tuple[Tensor, Draws]] = []
    for i in range(len(patterns)):
        index = (which == i).nonzero()[:, 0]
        problem, found = ask(
            {key: value[index] for key, value in tensors.items()} if len(patterns) > 1 else data
        )
        drawn = draw(problem, found, n)
        filled = {name: _whole(structure, name, tensors[name][index], drawn.get(name), n) for name in names}
        parts.append((index, Draws({**drawn.sites, **filled}, chains=drawn.chains, stats=drawn.stats)))
    if len(parts) == 1:
        return parts[0][1]
    sites = {}
    for name in parts[0][1]:
        site, first = structure.sites[name], parts[0][1][name]
        axis = first.ndim - len(site.event_shape) + structure.plates[structure.data_plate or ""].dim
        order = torch.cat([index for index, _ in parts]).argsort()
        sites[name] = torch.cat([drawn[name] for _, drawn in parts], axis).index_select(axis, order)
    return Draws(sites)


def _whole(structure: Structure, name: str, value: Tensor, rest: Tensor | None, n: int) -> Tensor:
    """Values with what is missing filled in, `[n, ...]`."""
    if rest is None:
        return value.expand(n, *value.shape)
    return whole(value, rest, len(structure.sites[name].event_shape))
