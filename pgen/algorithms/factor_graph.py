"""Factor graphs with plates, and the plan by which they are summed.

A plan is a list of steps (multiply these tables, sum out that variable, multiply over those plates) made
from names and sizes alone, so that a table too large or a coupling too tight is found before any memory is
spent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from pgen.algorithms.elimination import chains_of, elimination_order

#: Most numbers that one intermediate table may hold unless the caller says otherwise: 1 GiB of float64.
MAX_TABLE = 2**27


class Intractable(ValueError):
    """No exact answer at a reasonable price; `.variables` names the ones that are entangled."""

    def __init__(self, message: str, variables: Sequence[str]) -> None:
        """Keep the names beside the message."""
        super().__init__(message)
        self.variables = tuple(variables)


class TableTooLarge(Intractable):
    """An intermediate table would exceed the limit; `.size` is its number of elements."""

    def __init__(self, message: str, variables: Sequence[str], size: int) -> None:
        """Keep the size beside the names."""
        super().__init__(message, variables)
        self.size = size


class ImpossibleEvidence(ValueError):
    """The factors have no common support: what was observed has probability zero."""


@dataclass(frozen=True)
class Factor:
    """A log-table: `names[i]` names dimension i of `log`, a variable or a plate."""

    names: tuple[str, ...]
    log: Tensor

    def __post_init__(self) -> None:
        """Names and dimensions must pair up."""
        if len(self.names) != self.log.dim() or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"a factor needs one distinct name per dimension: got names {self.names} for a table of "
                f"shape {tuple(self.log.shape)}"
            )


@dataclass(frozen=True)
class FactorGraph:
    """Factors, the variables to sum over, and the plates that repeat them.

    Args:
        factors: the log-tables; a factor inside a plate has the plate's full size.
        variables: the plates that each variable lives in. A name of a factor that is not here is a plate.
        keep: plates that stay in every answer, as leading dimensions in this order; their rows are separate
            problems.
        powers: exponent of the product over a plate, for plates of which only a subsample is seen.
    """

    factors: tuple[Factor, ...]
    variables: Mapping[str, tuple[str, ...]]
    keep: tuple[str, ...] = ()
    powers: Mapping[str, float] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Number of values of every name; factors must agree on it."""
        sizes: dict[str, int] = {}
        for factor in self.factors:
            for name, size in zip(factor.names, factor.log.shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise ValueError(f"{name!r} has {sizes[name]} values in one factor and {size} in another")
        missing = sorted(set(self.variables) - set(sizes))
        if missing:
            raise ValueError(f"no factor mentions {', '.join(missing)}")
        return sizes


LONG_CHAIN = 24
"""Variables of a chain from which on it is multiplied two by two."""
SMALL_LINK = 6500
"""Most numbers that a product of two links may form, over all plates and copies: the work grows by the number of values,
the operations fall to the logarithm of the length, and up to here these outweigh it."""

#: How to align a table with the names of a step: a permutation, then a shape that broadcasts.
_View = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """Multiply `inputs`, aligned to `names`; then sum out the last name, or multiply over plates.

    Where it is a `chain`, the inputs are the links of one, from each variable to the next in the last two dimensions;
    then their product as matrices.
    """

    inputs: tuple[int, ...]  # slots: the factors first, then one per step
    views: tuple[_View, ...]  # one per input
    names: tuple[str, ...]
    variable: str | None
    products: tuple[int, ...] = ()
    power: float = 1.0
    chain: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps in order; each appends one slot to the tables of the graph, and the last slot is the answer."""

    steps: tuple[Step, ...]
    variables: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: Mapping[str, int]


def plan_of(graph: FactorGraph, max_table: int = MAX_TABLE, *, copies: int | None = None) -> Plan:
    """The plan that sums every variable of a graph.

    Innermost plates first: the variables that live there are eliminated one by one, what remains is
    multiplied over the plates that its variables do not live in, and so outward (Obermeyer et al. 2019,
    algorithm 2).

    Args:
        graph: the factors.
        max_table: most numbers in one intermediate table.
        copies: how often it is carried out at once, as under `vmap`. If given, long Markov chains of few values are
            multiplied as matrices, two by two, instead of summed from end to end.

    Raises:
        TableTooLarge: an intermediate table would exceed `max_table`.
        Intractable: variables are coupled across plates such that the sum is exponential in a plate's size.
        ValueError: factors contradict each other about sizes or plates.
    """
    sizes = graph.sizes()
    unknown = sorted(set(graph.keep) - set(sizes))
    if unknown:
        raise ValueError(f"plates to keep that no factor mentions: {', '.join(unknown)}")
    return plan_scopes(
        tuple(factor.names for factor in graph.factors),
        tuple((name, tuple(plates)) for name, plates in graph.variables.items()),
        tuple(sizes.items()),
        tuple(graph.keep),
        tuple(graph.powers.items()),
        max_table,
        copies,
    )


@lru_cache(maxsize=64)
def plan_scopes(
    scopes: tuple[tuple[str, ...], ...],
    variables: tuple[tuple[str, tuple[str, ...]], ...],
    sizes: tuple[tuple[str, int], ...],
    keep: tuple[str, ...],
    powers: tuple[tuple[str, float], ...],
    max_table: int,
    copies: int | None = None,
) -> Plan:
    """The plan, from names and sizes alone; remembered, since a training loop asks for it at every step.

    The arguments are those of `FactorGraph`, as a key: `scopes` are the names of each factor.
    """
    return _Planner(scopes, dict(variables), dict(sizes), keep, dict(powers), max_table, copies).plan()


class _Planner:
    """Books which slot holds which names while contexts (sets of plates) are eliminated inside out."""

    def __init__(
        self,
        scopes: tuple[tuple[str, ...], ...],
        variables: dict[str, tuple[str, ...]],
        sizes: dict[str, int],
        keep: tuple[str, ...],
        powers: dict[str, float],
        max_table: int,
        copies: int | None = None,
    ) -> None:
        self.copies = copies
        self.slots: list[tuple[str, ...]] = list(scopes)
        self.sizes, self.keep, self.powers, self.max_table = sizes, keep, powers, max_table
        self.steps: list[Step] = []
        self.rank = {name: i for i, name in enumerate(dict.fromkeys([*keep, *sizes]))}
        self.variables = variables
        self.context = {name: frozenset(plates) - set(keep) for name, plates in variables.items()}
        for scope in scopes:
            here = set(scope)
            for name in here & variables.keys():
                outside = self.context[name] - here
                if outside:
                    raise ValueError(
                        f"variable {name!r} lives in plate {', '.join(sorted(outside))}, but the factor over "
                        f"({', '.join(scope)}) does not"
                    )

    def plan(self) -> Plan:
        pending: dict[frozenset[str], list[int]] = {}
        for slot, scope in enumerate(self.slots):
            pending.setdefault(self._plates(scope), []).append(slot)
        members: dict[frozenset[str], list[str]] = {}
        for name, context in self.context.items():
            members.setdefault(context, []).append(name)
        results: list[int] = []
        while pending:
            leaf = max(pending, key=lambda context: (len(context), sorted(context)))
            for slot in self._eliminate(pending.pop(leaf), members.get(leaf, [])):
                outer = [name for name in self.slots[slot] if name in self.variables]
                if not outer:
                    results.append(self._reduce(slot, leaf))
                    continue
                context = frozenset().union(*(self.context[name] for name in outer))
                if context == leaf:
                    raise Intractable(
                        f"variables {', '.join(sorted(outer))} are coupled across all of plates "
                        f"{', '.join(sorted(leaf))} although none of them lives in all of those: the exact "
                        "sum is exponential in the size of a plate",
                        sorted(outer),
                    )
                pending.setdefault(context, []).append(self._reduce(slot, leaf - context))
        self._multiply(results, [])
        return Plan(tuple(self.steps), tuple(self.variables.items()), self.sizes)

    def _plates(self, scope: Sequence[str]) -> frozenset[str]:
        return frozenset(name for name in scope if name not in self.variables and name not in self.keep)

    def _eliminate(self, slots: list[int], names: list[str]) -> list[int]:
        """Sum `names` out of the product of `slots`; what is left mentions only variables of outer plates."""
        if not names:
            return slots
        if self.copies is not None:
            slots, names = self._chained(slots, names)
        scopes = [[name for name in self.slots[slot] if name in self.variables] for slot in slots]
        live = dict.fromkeys(slots)
        mentions: dict[str, set[int]] = {name: set() for name in names}
        for slot, scope in zip(slots, scopes, strict=True):
            for name in mentions.keys() & set(scope):
                mentions[name].add(slot)
        for name in elimination_order(scopes, self.sizes, names):
            inputs = sorted(mentions[name])
            new = self._multiply(inputs, [name])
            for slot in inputs:
                del live[slot]
                for other in self.slots[slot]:
                    if other in mentions:
                        mentions[other].discard(slot)
            live[new] = None
            for other in self.slots[new]:
                if other in mentions:
                    mentions[other].add(new)
        return list(live)

    def _chained(self, slots: list[int], names: list[str]) -> tuple[list[int], list[str]]:
        """Replace every long chain by one table of its two ends; gives the slots and the names that are left."""
        around: dict[str, set[int]] = {}
        for slot in slots:
            for name in self.slots[slot]:
                if name in self.variables:
                    around.setdefault(name, set()).add(slot)
        scope = {slot: frozenset(n for n in self.slots[slot] if n in self.variables) for slot in slots}
        live, left = dict.fromkeys(slots), dict.fromkeys(names)
        for chain in chains_of([scope[slot] for slot in slots], names):
            if len(chain) <= LONG_CHAIN or len({self.sizes[name] for name in chain}) > 1:
                continue
            plates = {
                name for v in chain for s in around[v] for name in self.slots[s] if name not in self.variables
            }
            rows = (self.copies or 1) * math.prod(self.sizes[name] for name in plates)
            if rows * self.sizes[chain[0]] ** 3 > SMALL_LINK:
                continue
            links = []
            for at, (one, other) in enumerate(itertools.pairwise(chain)):
                inner = at < len(chain) - 2  # the last variable stays, with what it has of its own
                between = {
                    s for s in around[other] if scope[s] == {one, other} or (inner and scope[s] == {other})
                }
                links.append(self._multiply(sorted(between), []))
                for slot in between:
                    del live[slot]
            live[self._link(links, chain)] = None
            for name in chain[1:-1]:
                del left[name]
        return list(live), list(left)

    def _link(self, links: Sequence[int], chain: Sequence[str]) -> int:
        """One step: the product of the links of a chain."""
        names = {name for slot in links for name in self.slots[slot]}
        plates = tuple(sorted(names - self.variables.keys(), key=self.rank.__getitem__))
        views = tuple(
            self._view(self.slots[slot], (*plates, one, other))
            for slot, (one, other) in zip(links, itertools.pairwise(chain), strict=True)
        )
        names = (*plates, chain[0], chain[-1])
        self.steps.append(Step(tuple(links), views, names, None, chain=True))
        self.slots.append(names)
        return len(self.slots) - 1

    def _multiply(self, inputs: Sequence[int], last: list[str]) -> int:
        """One step: the product of some slots over the union of their names, with `last` summed out."""
        union = {name for slot in inputs for name in self.slots[slot]}.difference(last)
        # Plates lead, so that the reduction over them and the sampling along them find them in one place.
        names = (*sorted(union, key=lambda name: (name in self.variables, self.rank[name])), *last)
        size = 1
        for name in names:
            size *= self.sizes[name]
        if size > self.max_table:
            clique = [name for name in names if name in self.variables]
            raise TableTooLarge(
                f"summing out {last[0] if last else 'the last plate'} needs a table of {size:,} numbers over "
                f"({', '.join(names)}); the limit is {self.max_table:,}",
                clique,
                size,
            )
        views = tuple(self._view(self.slots[slot], names) for slot in inputs)
        self.steps.append(Step(tuple(inputs), views, names, last[0] if last else None))
        self.slots.append(tuple(name for name in names if name not in last))
        return len(self.slots) - 1

    def _view(self, scope: tuple[str, ...], names: tuple[str, ...]) -> _View:
        where = {name: i for i, name in enumerate(scope)}
        permutation = tuple(where[name] for name in names if name in where)
        return permutation, tuple(self.sizes[name] if name in where else 1 for name in names)

    def _reduce(self, slot: int, plates: Collection[str]) -> int:
        """Product of a slot over some plates, raised to their powers."""
        if not plates:
            return slot
        names = self.slots[slot]
        power = 1.0
        for plate in plates:
            power *= self.powers.get(plate, 1.0)
        dims = tuple(i for i, name in enumerate(names) if name in plates)
        self.steps.append(Step((slot,), (self._view(names, names),), names, None, dims, power))
        self.slots.append(tuple(name for name in names if name not in plates))
        return len(self.slots) - 1
