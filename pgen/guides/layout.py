"""Where values stand: the plates of every site and argument, and batch dimensions that belong to no plate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pyro
from torch import Tensor

from pgen.guides.evidence import INPUT, Probe, Seen, Slot
from pgen.guides.features import matrix, robust_centre
from pgen.structure import Structure


@dataclass(frozen=True)
class Layout:
    """The plates of each site, with a nameless one for each batch dimension that is in none.

    Attributes:
        slots: every plate with its usual size.
        plates: the plates of each site, and of each argument under `input:NAME`.
        nameless: those that the program does not open.
        positional: plates whose elements are told apart: those of the probe, the nameless ones, and those
            that nothing observed lies in, such as the components of a mixture.
        rows: the plates over rows of data, whose size changes from batch to batch.
        leading: for each argument, how many of its leading dimensions are plates.
        nesting: batch dimensions in use.
    """

    slots: Mapping[str, Slot]
    plates: Mapping[str, tuple[str, ...]]
    nameless: frozenset[str]
    positional: frozenset[str]
    rows: frozenset[str]
    leading: Mapping[str, int]
    nesting: int

    @staticmethod
    def of(structure: Structure, probe: Probe) -> Layout:
        """The layout of a program, sizes as they are in the data seen."""
        seen = probe.seen
        slots = {name: Slot(plate.size, plate.dim) for name, plate in structure.plates.items()} | dict(
            seen.plates
        )
        plates: dict[str, tuple[str, ...]] = {}
        nameless: dict[str, Slot] = {}
        for site in structure:
            taken = {slots[p].dim for p in site.plates}
            own = {
                f"{site.name}[{dim}]": Slot(size, dim)
                for dim, size in zip(range(-len(site.batch_shape), 0), site.batch_shape, strict=True)
                if size > 1 and dim not in taken
            }
            nameless |= own
            plates[site.name] = (*site.plates, *own)
        rows = frozenset(
            p.name for p in structure.plates.values() if p.name in structure.data_plates or p.subsampled
        )
        leading = {}
        for name in seen.observed:
            if name.startswith(INPUT):
                plates[name], leading[name] = _of_argument(name, structure, seen, rows)
        read = [*structure.observed, *leading]
        hidden = frozenset(slots).difference(rows, *(plates[name] for name in read))
        positional = probe.positional | hidden | frozenset(nameless)
        return Layout(
            slots | nameless, plates, frozenset(nameless), positional, rows, leading, structure.nesting
        )

    def is_local(self, name: str) -> bool:
        """Whether a site has a value of its own for every row."""
        return not self.rows.isdisjoint(self.plates[name])

    def inner_first(self) -> list[str]:
        """All plates, those inside others first: by the number of sites in them, then from the right."""
        held = {p: sum(p in plates for plates in self.plates.values()) for p in self.slots}
        return sorted(self.slots, key=lambda p: (held[p], -self.slots[p].dim))

    def now(self, plates: Mapping[str, tuple]) -> dict[str, Slot]:
        """All plates, those given as they are now."""
        return {**self.slots, **{name: Slot(*plate) for name, plate in plates.items()}}

    def by_element(self, flat: Tensor, plates: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Centre and unit [copies, K] of draws [n, *batch, K], for each element of some plates in turn.

        The elements of plates over rows, and of those that the draws do not have in full, are taken together.
        """
        apart = [
            p
            for p in plates
            if p not in self.rows
            and flat.ndim > -self.slots[p].dim + 1
            and flat.shape[self.slots[p].dim - 1] == self.slots[p].size
        ]
        axes = [self.slots[p].dim - 1 for p in apart]
        draws = flat.movedim(axes, list(range(-len(axes) - 1, -1))) if axes else flat
        shape = [self.slots[p].size if p in apart else 1 for p in plates]
        whole = [self.slots[p].size for p in plates]
        found = robust_centre(matrix(draws, len(axes) + 1))
        loc, scale = (v.reshape(*shape, flat.shape[-1]) for v in found)
        loc, scale = (v.expand(*whole, -1).reshape(-1, flat.shape[-1]) for v in (loc, scale))
        return loc, scale

    def place(self, name: str, value: Tensor, slots: Mapping[str, Slot]) -> Tensor:
        """An argument with its leading dimensions where its plates are."""
        plates = self.plates[name]
        batch = [1] * max((-slots[p].dim for p in plates), default=0)
        for p in plates:
            batch[slots[p].dim] = slots[p].length
        return value.reshape((*batch, *value.shape[self.leading[name] :]))


def _of_argument(
    name: str, structure: Structure, seen: Seen, rows: frozenset[str]
) -> tuple[tuple[str, ...], int]:
    """The plates that an argument varies over, and how many of its leading dimensions they take.

    The leading dimension is that of the rows. If the shape goes on as the batch shape of a site that is
    computed from the argument, the argument is aligned with that site's plates.
    """
    value = seen.observed[name]
    over = next((p for p in structure.plates if p in rows), None)
    if over is None or not value.ndim or value.shape[0] != seen.plates[over].length:
        return (), 0
    for site in structure:
        slots = sorted((seen.plates[p] for p in site.plates), key=lambda slot: slot.dim)
        sizes = [slot.length for slot in slots]
        if (
            name.removeprefix(INPUT) in site.inputs
            and len(sizes) > 1
            and slots[0] == seen.plates[over]
            and list(value.shape[: len(sizes)]) == sizes
        ):
            return site.plates, len(sizes)
    return (over,), 1


class Plates:
    """The plates of one call, each opened once and entered as often as needed."""

    def __init__(self, layout: Layout, slots: Mapping[str, Slot]) -> None:
        """Keep sizes, dimensions and indices."""
        self.layout = layout
        self.slots = slots
        self.opened: dict[str, pyro.plate] = {}

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Be inside the plates of a site."""
        with ExitStack() as stack:
            for plate in self.layout.plates[name]:
                if plate not in self.layout.nameless:
                    stack.enter_context(self._open(plate))
            yield

    def _open(self, name: str) -> pyro.plate:
        if name not in self.opened:
            slot = self.slots[name]
            self.opened[name] = pyro.plate(name, slot.size, subsample=slot.index, dim=slot.dim)
        return self.opened[name]
