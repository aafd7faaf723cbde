"""The discrete latents that chains move: their elements, and the values of each.

An element is known to kernels by an index: that of its value, where there is a list of them; else the whole number itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pgen.algorithms.kernels.local import ENDLESS
from pgen.density import Density
from pgen.isolation import validating
from pgen.terms import FIXED, elementwise

_MOST_VALUES = 100  # of a variable whose values are in order: beyond, it is moved by steps
_PRIOR_DRAWS = 16  # runs of the program


@dataclass(frozen=True)
class Flips:
    """The discrete latents that chains move.

    Attributes:
        shapes: elements of each, by site.
        supports: values of each, `[K, *event]`; None where they are whole numbers without a list.
        types: of the values.
        fixed: whether all have the same values wherever other latents are.
    """

    shapes: Mapping[str, torch.Size]
    supports: Mapping[str, Tensor | None]
    types: Mapping[str, torch.dtype]
    fixed: bool

    @staticmethod
    def of(density: Density) -> Flips:
        """Those of a density."""
        shapes: dict[str, torch.Size] = {}
        supports: dict[str, Tensor | None] = {}
        types: dict[str, torch.dtype] = {}
        with validating(False), torch.no_grad():
            nodes: Any = poutine.trace(density.problem).get_trace().nodes
        fixed = True
        for name in density.held:
            fn, value = elementwise(nodes[name]["fn"]), nodes[name]["value"]
            event = len(fn.event_shape)
            shapes[name] = value.shape[: value.dim() - event]
            supports[name] = None if density.structure.sites[name].support_parents else _values_of(fn, event)
            types[name] = value.dtype
            fixed = fixed and isinstance(fn, FIXED)
        return Flips(shapes, supports, types, fixed)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def cardinalities(self) -> tuple[int, ...]:
        """Numbers of values, element by element; 0 where there is no list."""
        counts = {name: ENDLESS if values is None else len(values) for name, values in self.supports.items()}
        return tuple(counts[name] for name, size in self.sizes.items() for _ in range(size))

    @cached_property
    def counting(self) -> frozenset[str]:
        """Those whose values are their indices."""
        return frozenset(
            name
            for name, support in self.supports.items()
            if support is not None
            and support.dim() == 1
            and bool((support == torch.arange(len(support), device=support.device)).all())
        )

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Indices `[*n, m]` as values `[*n, *batch, *event]` by site."""
        parts = dict(zip(self.sizes, z.long().split(list(self.sizes.values()), -1), strict=True))
        found = {}
        for name, part in parts.items():
            support = self.supports[name]
            if support is None or name in self.counting:
                value = part.to(self.types[name])
            else:
                value = support.to(part.device)[part]
            event = () if support is None else support.shape[1:]
            found[name] = value.reshape((*z.shape[:-1], *self.shapes[name], *event))
        return found

    def relaxed(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One-hot codes `[m, K]` as values, linearly, and as codes `[*batch, K_i]`, by site."""
        values: dict[str, Tensor] = {}
        codes: dict[str, Tensor] = {}
        for name, part in zip(self.sizes, x.split(list(self.sizes.values())), strict=True):
            support = self.supports[name]
            assert support is not None
            code = part[:, : len(support)]
            value = code @ support.reshape(len(support), -1).to(code)
            values[name] = value.reshape((*self.shapes[name], *support.shape[1:]))
            codes[name] = code.reshape((*self.shapes[name], len(support)))
        return values, codes

    def indices(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values `[n, *batch, *event]` by site as indices `[n, m]`: of the nearest value, where there is a list."""
        found = []
        for name, size in self.sizes.items():
            support, value = self.supports[name], values[name]
            if support is None:
                found.append(value.reshape(len(value), size).long())
                continue
            apart = (
                value.reshape(len(value), size, 1, -1).double() - support.reshape(len(support), -1).double()
            )
            found.append(apart.square().sum(-1).argmin(-1))
        return torch.cat(found, 1)


def _values_of(fn: Any, event: int) -> Tensor | None:
    """Values of a law with a list of them; None where steps are the better way."""
    if not fn.has_enumerate_support:
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except NotImplementedError:  # it differs from element to element
        return None
    if len(support) > _MOST_VALUES and not isinstance(fn, FIXED):
        return None
    return support.reshape(support.shape[:1] + support.shape[support.dim() - event :])


def first_choices(density: Density, flips: Flips, chains: int, spread: int = 0) -> Tensor:
    """Indices to begin with, `[C, m]`: uniform where there is a list of values, else drawn by the program's prior.

    `spread`: the most that is added to numbers without a list; where the prior's are impossible, larger ones may do.
    """
    device = density.problem.device
    sizes = torch.tensor(flips.cardinalities, device=device)
    z = (torch.rand(chains, len(sizes), device=device) * sizes).long()
    counts = [name for name, support in flips.supports.items() if support is None]
    if counts:
        prior = _prior(density, counts, min(chains, _PRIOR_DRAWS))
        prior = {name: drawn[torch.arange(chains) % len(drawn)].to(device) for name, drawn in prior.items()}
        whole = flips.indices({**flips.values(z), **prior})
        whole = whole + (torch.rand(z.shape, device=device) * (spread + 1)).long()
        z = torch.where(sizes == ENDLESS, whole, z)
    return z


def _prior(density: Density, names: list[str], draws: int) -> dict[str, Tensor]:
    """So many draws of some latents by the program."""
    with validating(False), torch.no_grad():
        traces: list[Any] = [poutine.trace(density.problem).get_trace().nodes for _ in range(draws)]
    return {name: torch.stack([nodes[name]["value"] for nodes in traces]) for name in names}
