"""All values of a program's finite latents at once: one run gives every factor of its joint distribution.

Each enumerated latent is given all its values along a batch dimension left of the plates. Two latents need
different dimensions only if some site depends on both, so the dimensions are a colouring of the moral
graph: a hidden Markov chain of any length takes two, and a network of a hundred sites a handful, where one
dimension per site would exhaust the 64 that a tensor can have. No annotation is needed;
`infer={"enumerate": ...}`, `config_enumerate` and `pyro.markov` are hints that change nothing.

A program that was not written with batches in mind is run on one value per colour at a time instead. The
same colours make that cheap: a chain of K states takes K squared runs, whatever its length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.elimination import colouring, moral_neighbours
from pgen.algorithms.factor_graph import Factor, FactorGraph
from pgen.errors import PgenError
from pgen.factoring import Reader, refused
from pgen.structure import Structure, describe_leak

#: Dimensions that a tensor may have (64), less a few for the program and its distributions to work with.
_MAX_DIMS = 60
#: Runs that a program may be given where it cannot take all values at once.
_MAX_RUNS = 256
#: Random joint values at which factors are compared with a run on these values alone.
_TRIALS = 2


@dataclass(frozen=True)
class Enumeration:
    """What a program says about its sites, as factors over its enumerated latents.

    Attributes:
        factors: the log probability of each site; plates and latents keep the names that they have in the
            program.
        variables: the plates that each enumerated latent lives in.
        supports: for each enumerated latent its values `[K, *event]`; index k of a factor means the k-th.
        shapes: for each enumerated latent its batch shape in the program.
        powers: what the product over a plate is raised to, where only a part of the plate was run.
        apart: whether the program had to be run on the values one by one.
    """

    factors: Mapping[str, Factor]
    variables: Mapping[str, tuple[str, ...]]
    supports: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    powers: Mapping[str, float]
    apart: bool = False

    def graph(self, sites: Collection[str] | None = None, keep: Collection[str] = ()) -> FactorGraph:
        """The factor graph of some sites (all, if none are named), with plates to keep apart in every sum."""
        chosen = {name: f for name, f in self.factors.items() if sites is None or name in sites}
        named = {name for factor in chosen.values() for name in factor.names}
        return FactorGraph(
            tuple(chosen.values()),
            {name: plates for name, plates in self.variables.items() if name in named},
            tuple(keep),
            {plate: power for plate, power in self.powers.items() if power != 1.0 and plate not in keep},
        )

    def values(self, name: str, index: Tensor) -> Tensor:
        """Values at indices `[n, *plates]`, shaped as n draws by the program: `[n, *batch, *event]`."""
        support = self.supports[name]
        return support[index].reshape(index.shape[:1] + self.shapes[name] + support.shape[1:])


def enumerate_sites(
    run: Callable[[], object],
    structure: Structure,
    sites: Collection[str] = (),
    *,
    nesting: int | None = None,
    powers: Mapping[str, float] | None = None,
    check: bool = False,
    apart: bool = False,
) -> Enumeration:
    """Run a program with all values of the named latents, and read the log probability of every site.

    Other latents keep the values that `run` gives them: one each, or many along a plate left of the
    program's own.

    Args:
        run: runs the program, e.g. a `Problem`; it may be called several times.
        structure: the structure of the program.
        sites: the latents to enumerate.
        nesting: batch dimensions that `run` uses; by default those of the structure.
        powers: factors by which `run` scales what is inside a plate (see `ScaleRows`). Like the scale of a
            subsampled plate, they apply to what is left once the latents inside the plate are summed out.
        check: compare with runs on single values, and where the program gives other answers for many values
            at once (as `m[z] = 1` does), take them one by one. Then too, compare with runs in which the
            elements of a plate have different values: a program may mix them (as `z.cumsum(-1)` does).
        apart: take them one by one in any case, as an earlier call with `check` found necessary.

    Raises:
        Refused: a site stands in the way; the refusal names it and what it lacks.
    """
    plan = _Plan(
        run, structure, frozenset(sites), structure.nesting if nesting is None else nesting, powers or {}
    )
    for name in plan.chosen:
        _require_enumerable(structure, name)
    _require_followed(structure, plan.wanted)
    failure: Exception | None = None
    site: str | None = None
    for reader in () if apart else plan.readers():
        try:
            found = _found(reader.read(run))
        except PgenError:
            raise
        except Exception as error:
            if not plan.chosen:
                raise
            failure, site = error, reader.current
            continue
        site = plan.differing(found) if check and plan.chosen else None
        if site is None:
            return found
    try:
        found = plan.one_by_one()
    except PgenError as error:
        if failure is None:
            raise
        raise refused(
            site,
            "statements that work on all values of the finite latents at once",
            f"{structure.name} raised {type(failure).__name__} near it ({failure}) when "
            f"{_listed(plan.chosen)} held all their values, as tensors of shape [values, 1, ...], and to try "
            "them one by one takes too many runs; index tensors by tensors (`table[z]`, "
            "`Vindex(table)[..., z]`), and choose by torch.where",
        ) from error
    site = plan.differing(found) if check and any(found.variables.values()) else None
    if site is not None:
        raise refused(
            site,
            "a law of its own for every element of its plates",
            f"its plate's elements are mixed: its log probability in one element of {_plates_of(site, structure)} "
            "depends on the values that finite latents have in the others, while a plate says that its "
            "elements are independent",
        )
    return found


@dataclass(frozen=True)
class _Plan:
    """What the attempts at enumeration have in common."""

    run: Callable[[], object]
    structure: Structure
    wanted: frozenset[str]
    nesting: int
    powers: Mapping[str, float]

    @property
    def chosen(self) -> list[str]:
        """The latents, in program order."""
        return [name for name in self.structure.sites if name in self.wanted]

    def scopes(self) -> dict[str, tuple[str, ...]]:
        """For each site the latents that its law or value involves."""
        return {s.name: tuple(p for p in (*s.parents, s.name) if p in self.wanted) for s in self.structure}

    def readers(self) -> Iterator[Reader]:
        """First a dimension per colour; then, for programs that combine values in passing, one per latent."""
        scopes, chosen = self.scopes(), self.chosen
        shared = colouring(moral_neighbours(scopes.values()))
        own = {name: i for i, name in enumerate(chosen)}
        for colours, candidates in ((shared, scopes), (own, dict.fromkeys(scopes, tuple(chosen)))):
            dims = {name: -(self.nesting + 1 + colours[name]) for name in chosen}
            if -min(dims.values(), default=0) <= _MAX_DIMS:
                yield Reader(self.structure, self.nesting, self.powers, dims=dims, candidates=candidates)

    def one_by_one(self) -> Enumeration:
        """A run for each joint value of the colours: together they visit every cell of every factor."""
        scopes, chosen = self.scopes(), self.chosen
        colours = colouring(moral_neighbours(scopes.values()))
        first = self._pick(dict.fromkeys(chosen, 0))
        sizes = [0] * (max(colours.values(), default=-1) + 1)
        for name in chosen:
            sizes[colours[name]] = max(sizes[colours[name]], len(first.supports[name]))
        if math.prod(sizes) > _MAX_RUNS:
            raise refused(
                None,
                f"room: at most {_MAX_DIMS} finite latents may meet, or {_MAX_RUNS} joint values",
                f"{len(sizes)} latents of {self.structure.name}, with {math.prod(sizes):,} joint values, meet "
                "in its distributions",
            )
        cells: dict[str, dict[tuple[int, ...], Factor]] = {name: {} for name in first.factors}
        for at in itertools.product(*(range(size) for size in sizes)):
            picks = {name: min(at[colours[name]], len(first.supports[name]) - 1) for name in chosen}
            reader = first if not any(at) else self._pick(picks)
            if reader.factors.keys() != first.factors.keys():
                odd = next(iter(reader.factors.keys() ^ first.factors.keys()))
                raise refused(
                    odd, "a place in every run", "whether it is met depends on the value of a finite latent"
                )
            for name, factor in reader.factors.items():
                cells[name].setdefault(tuple(picks[v] for v in scopes.get(name, ())), factor)
        factors = {}
        for name, table in cells.items():
            scope = scopes.get(name, ())
            order = itertools.product(*(range(len(first.supports[v])) for v in scope))
            logs = torch.stack([table[at].log for at in order])
            shape = [len(first.supports[v]) for v in scope]
            factors[name] = Factor(
                (*scope, *first.factors[name].names), logs.reshape(shape + list(logs.shape[1:]))
            )
        return Enumeration(factors, first.variables, first.supports, first.shapes, first.powers, apart=True)

    def differing(self, found: Enumeration) -> str | None:
        """A site whose factor is not its log probability at some joint value of the latents, if any."""
        for index in self._trials(found):
            held = {name: found.values(name, i.unsqueeze(0))[0] for name, i in index.items()}
            alone = self._hold(held)
            for name, factor in found.factors.items():
                if name not in alone or not _inside(factor, found.variables):
                    continue
                if not _same(*_aligned(factor, alone[name], index, found.variables)):
                    # A law with a noisy log probability never gives the same number twice.
                    again = self._hold(held).get(name)
                    if again is not None and _same(again.log, alone[name].log):
                        return name
        return None

    def _trials(self, found: Enumeration) -> Iterator[dict[str, Tensor]]:
        """Joint values: random ones, and where there are plates, elements all alike and in alternation."""
        shapes = {}
        for name, plates in found.variables.items():
            sizes = dict(zip(found.factors[name].names, found.factors[name].log.shape))
            shapes[name] = torch.Size(sizes[plate] for plate in plates)
        supports = found.supports
        plated = any(shape.numel() > 1 for shape in shapes.values())
        for _ in range(2 * _TRIALS if plated else _TRIALS):
            yield {
                name: torch.randint(len(supports[name]), shape, device=supports[name].device)
                for name, shape in shapes.items()
            }
        for start, step in itertools.product((0, 1), (0, 1)) if plated else ():
            values = {}
            for name, shape in shapes.items():
                place = torch.arange(shape.numel(), device=supports[name].device).reshape(shape)
                values[name] = (start + step * place) % len(supports[name])
            yield values

    def _hold(self, values: Mapping[str, Tensor]) -> Mapping[str, Factor]:
        return Reader(self.structure, self.nesting, self.powers, held=values).read(self.run).factors

    def _pick(self, picks: Mapping[str, int]) -> Reader:
        return Reader(self.structure, self.nesting, self.powers, picks=picks).read(self.run)


def _found(reader: Reader) -> Enumeration:
    return Enumeration(reader.factors, reader.variables, reader.supports, reader.shapes, reader.powers)


def _aligned(
    factor: Factor, alone: Factor, index: Mapping[str, Tensor], variables: Mapping[str, Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """A factor looked up at joint values of its latents, and the same from a run on those values alone."""
    plates = [name for name in factor.names if name not in variables]
    place = {plate: i for i, plate in enumerate(plates)}
    at = []
    for name, size in zip(factor.names, factor.log.shape):
        if name in place:
            shape = [size if plate == name else 1 for plate in plates]
            at.append(torch.arange(size, device=factor.log.device).reshape(shape))
        else:
            own = [plate for plate in plates if plate in variables[name]]
            value = index[name].permute([variables[name].index(plate) for plate in own])
            at.append(value[tuple(slice(None) if plate in own else None for plate in plates)])
    found = factor.log[tuple(at)] if at else factor.log
    return found, alone.log.permute([alone.names.index(plate) for plate in plates])


def _inside(factor: Factor, variables: Mapping[str, Sequence[str]]) -> bool:
    """Whether a factor is inside the plates of its latents, so that an element of it is one of theirs."""
    return all(plate in factor.names for v in factor.names for plate in variables.get(v, ()))


def _plates_of(site: str, structure: Structure) -> str:
    plates = structure.sites[site].plates
    return f"plate {plates[-1]!r}" if plates else "a plate"


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-8 if one.dtype == torch.float64 else 1e-3
    return torch.allclose(one, other.to(one.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _require_enumerable(structure: Structure, name: str) -> None:
    site = structure.sites[name]
    if site.observed or not site.enumerable:
        raise refused(
            name,
            "Capability.ENUMERATE",
            f"{site.distribution} with support {site.support} has no finite list of values to sum over",
        )


def _require_followed(structure: Structure, wanted: frozenset[str]) -> None:
    for leak in structure.leaks:
        lost = sorted(leak.labels & wanted)
        if lost:
            raise refused(
                lost[0],
                "uses that stay in torch",
                f"{describe_leak(leak)}. Index tensors by tensors (`table[z]`, `table` a tensor) and choose "
                "by torch.where instead of `if`, so that all values can be tried",
            )
