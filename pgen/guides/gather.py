"""Features of sites in different plates, brought together: broadcast, pooled, or laid side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pgen.errors import DataError
from pgen.guides.evidence import Slot
from pgen.nn import DeepSet


@dataclass(frozen=True)
class Source:
    """Features of one input: its name, the plates that it varies over, how many features it has."""

    name: str
    plates: frozenset[str]
    features: int


class Gather(nn.Module):
    """Brings the features of several inputs to the batch of one target.

    The target has some plates. An input in fewer plates broadcasts. An input in further plates is a set of
    elements for each element of the target: plate by plate, innermost first, inputs that share a plate are
    concatenated element by element and summarised by a `DeepSet`. Along positional plates they are laid side
    by side instead, element 0, 1, ...

    Args:
        sources: the inputs.
        plates: plates of the target that it keeps as batch dimensions.
        inner_first: all plates, in the order in which they are pooled.
        positional: the plates whose elements differ in kind.
        sizes: number of elements of each plate: fixed for positional ones, usual for others.
        learned, hidden: of each `DeepSet`.

    Attributes:
        outputs: number of features that come out.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plates: Collection[str],
        inner_first: Sequence[str],
        positional: Collection[str],
        sizes: Mapping[str, int],
        *,
        learned: int = 32,
        hidden: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.names = tuple(source.name for source in sources)
        self.positional = frozenset(positional)
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        self.sets = nn.ModuleDict()
        held = dict(enumerate(sources))
        for plate in inner_first:
            inside = tuple(i for i, source in held.items() if plate in source.plates and plate not in plates)
            if not inside:
                continue
            parts = [held.pop(i) for i in inside]
            features = sum(part.features for part in parts)
            if plate in positional:
                features *= sizes[plate]
            else:
                pool = DeepSet(features, learned, hidden, size=sizes[plate])
                self.sets[str(len(self.steps))] = pool
                features = pool.outputs
            union = frozenset().union(*(part.plates for part in parts)) - {plate}
            held[len(sources) + len(self.steps)] = Source("", union, features)
            self.steps.append((plate, inside))
        self.outputs = sum(source.features for source in held.values())

    def forward(self, features: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Tensor:
        """Features by input name [..., F] to features of the target [..., outputs]."""
        held = {i: features[name] for i, name in enumerate(self.names)}
        for step, (plate, inside) in enumerate(self.steps):
            joined = spread(concatenate([held.pop(i) for i in inside]), slots[plate])
            dim = slots[plate].dim - 1
            if plate in self.positional:
                found = side_by_side(joined, dim)
            else:
                found = self.sets[str(step)](joined, dim).unsqueeze(dim)
            held[len(self.names) + step] = found
        return concatenate(list(held.values()))


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last dimension, broadcasting all others."""
    if len(parts) == 1:
        return parts[0]
    batch = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], dim=-1)


def spread(features: Tensor, slot: Slot) -> Tensor:
    """Features [..., F] with the dimension of a plate at full size, also where they do not vary over it."""
    short = 1 - slot.dim - features.ndim
    if short > 0:
        features = features.reshape((1,) * short + features.shape)
    shape = list(features.shape)
    shape[slot.dim - 1] = slot.length
    return features.expand(shape)


def side_by_side(features: Tensor, dim: int) -> Tensor:
    """Features [..., n, ..., F] as [..., 1, ..., n * F]."""
    return features.movedim(dim, -2).flatten(-2).unsqueeze(dim)


def stack_out(outputs: Tensor, slots: Sequence[Slot]) -> Tensor:
    """The reverse for several plates, in order: [..., 1, ..., n1 * n2 * F] as [..., n1, ..., n2, ..., F]."""
    if not slots:
        return outputs
    sizes = [slot.length for slot in slots]
    short = max(-slot.dim for slot in slots) + 1 - outputs.ndim
    if short > 0:
        outputs = outputs.reshape((1,) * short + outputs.shape)
    apart, k = outputs.unflatten(-1, (*sizes, -1)), len(slots)
    for i, slot in enumerate(slots):  # swap each with the dimension of size 1 that stands in its place
        apart = apart.transpose(i - k - 1, slot.dim - k - 1)
    return apart.reshape(*apart.shape[: -k - 1], apart.shape[-1])


def require_sizes(name: str, sizes: Mapping[str, int], slots: Mapping[str, Slot]) -> None:
    """Raise unless the plates of fixed size have it."""
    for plate, size in sizes.items():
        if slots[plate].length != size:
            msg = (
                f"plate {plate!r} has {slots[plate].length} elements, but the guide of site {name!r} was "
                f"made for {size}: they are told apart by position, or have parameters of their own. Give "
                "data of that size."
            )
            raise DataError(msg)
