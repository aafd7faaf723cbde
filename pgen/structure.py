"""The structure of a program: its sites, plates and dependence graph, read off one inspected run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch

import pgen.supports  # noqa: F401 - registers the bijections of supports that sites may have
from pgen.capability import Capability, Measure
from pgen.conversion import Conversions
from pgen.provenance import Leak


@dataclass(frozen=True)
class Plate:
    """A plate: conditional independence over `size` copies, along batch dimension `dim`.

    Attributes:
        subsampled: these are some of more copies, for which they stand.
        chosen: the program says which they are (`subsample=index`), the same ones in every run.
    """

    name: str
    size: int
    dim: int
    subsampled: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Site:
    """One `pyro.sample` (or `pyro.factor`) statement, as it was met in the inspected run.

    Attributes:
        distribution: name of the distribution's class, wrappers removed.
        parents: names of the sites whose values its law was computed from (a superset where `certain` is False).
        params: names of the learned tensors that its law was computed from.
        inputs: names of the data arguments that its law was computed from.
        support_parents: names of the sites that its *support* was computed from.
        support_params: names of the learned tensors that its support was computed from.
        cardinality: number of values of a finite support, else None.
        factor: a `pyro.factor` statement: soft evidence, not a random value.
        certain: False where a value left torch before this site, so that more sites than those named may matter.
        improper: its density has no finite integral (`ImproperUniform`).
        completes: its law knows its conditionals (`given`), so that values that are missing in part can be drawn.
    """

    name: str
    distribution: str
    capabilities: frozenset[Capability]
    support: Any
    event_shape: torch.Size
    batch_shape: torch.Size
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    observed: bool
    enumerable: bool
    params: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    support_parents: tuple[str, ...] = ()
    support_params: tuple[str, ...] = ()
    cardinality: int | None = None
    factor: bool = False
    certain: bool = True
    dtype: torch.dtype = torch.float32
    improper: bool = False
    completes: bool = False

    @property
    def discrete(self) -> bool:
        """Whether its values are counted rather than measured."""
        return bool(getattr(self.support, "is_discrete", False))

    @property
    def weighable(self) -> bool:
        """Whether it has a density of its own, not one that a denoiser has to be integrated for."""
        own = Capability.LOG_PROB in self.capabilities or self.improper
        return own and Capability.DENOISER not in self.capabilities


@dataclass(frozen=True)
class Structure:
    """What pgen knows about a program before any inference.

    Attributes:
        sites: every site by name, in program order.
        graph: `nx.DiGraph`, an edge from each parent; edges carry `certain`.
        plates: every plate by name.
        data_plates: the plates whose size is the number of rows of the data.
        leaks: where values left torch, so that dependence could not be followed.
        params: names of all learned tensors of the program.
        bent: sites whose log density is seen not to be quadratic in the Gaussian latents (see `pgen.linearity`).
    """

    sites: Mapping[str, Site]
    graph: nx.DiGraph
    plates: Mapping[str, Plate]
    data_plates: tuple[str, ...] = ()
    leaks: tuple[Leak, ...] = ()
    params: tuple[str, ...] = ()
    name: str = "program"
    missing: frozenset[str] = frozenset()
    bent: tuple[str, ...] = ()
    conversions: Conversions = field(default_factory=Conversions)

    @property
    def latents(self) -> tuple[str, ...]:
        """Sites that are neither observed nor factors, in program order."""
        return tuple(s.name for s in self.sites.values() if not s.observed and not s.factor)

    @property
    def observed(self) -> tuple[str, ...]:
        """Observed sites, in program order."""
        return tuple(s.name for s in self.sites.values() if s.observed and not s.factor)

    @property
    def factors(self) -> tuple[str, ...]:
        """`pyro.factor` statements, in program order."""
        return tuple(s.name for s in self.sites.values() if s.factor)

    @property
    def weighted(self) -> bool:
        """Whether its density is that of no law: it has factors, or a plate whose copies stand for more."""
        return bool(self.factors) or any(p.chosen for p in self.plates.values())

    @property
    def data_plate(self) -> str | None:
        """The plate over the rows of the data, if the program has one."""
        return self.data_plates[0] if self.data_plates else None

    @property
    def nesting(self) -> int:
        """Batch dimensions in use; dimensions to the left of these are free."""
        return max(
            [0, *(len(s.batch_shape) for s in self.sites.values()), *(-p.dim for p in self.plates.values())]
        )

    @property
    def measure(self) -> Measure:
        """What log probabilities of the observed sites are: of a "mass", a "density", or "mixed"."""
        kinds = {kind for n in self.observed for kind in _kinds(self.sites[n].support)}
        return "mixed" if len(kinds) == 2 else ("mass" if kinds == {True} else "density")

    @property
    def evidenced(self) -> frozenset[str]:
        """Latents that the observed values bear upon. The others integrate to one, whatever their laws."""
        found: set[str] = set()
        ahead = [*self.observed, *self.factors]
        while ahead:
            for parent in self.sites[ahead.pop()].parents:
                if parent not in found:
                    found.add(parent)
                    ahead.append(parent)
        return frozenset(found.intersection(self.latents))

    @property
    def tied(self) -> bool:
        """Whether the rows of the data share a latent, or there are none: log p is then one number for all."""
        return not self.data_plates or any(not self.local(name) for name in self.latents)

    def local(self, name: str) -> bool:
        """Whether a site has a value of its own in every row."""
        return any(p in self.data_plates for p in self.sites[name].plates)

    def __iter__(self) -> Iterator[Site]:
        """The sites, in program order."""
        return iter(self.sites.values())

    def __repr__(self) -> str:
        """One line per site: law, plates, parents."""
        lines = [f"Structure of {self.name}:"]
        for s in self:
            role = "factor" if s.factor else ("observed" if s.observed else "latent")
            shape = "" if not s.event_shape else f" {list(s.event_shape)}"
            given = f" | {', '.join(s.parents)}" if s.parents else ""
            plates = f"  in {', '.join(s.plates)}" if s.plates else ""
            lines.append(
                f"  {role:8} {s.name}{given} ~ {s.distribution}{shape}{plates}{'' if s.certain else '  (parents uncertain)'}"
            )
        lines += [f"  note: {describe_leak(leak)}" for leak in self.leaks]
        return "\n".join(lines)


def _kinds(support: Any) -> set[bool]:
    """Whether the numbers of a value are counted, or measured, or some of them the one and some the other."""
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    if isinstance(support, torch.distributions.constraints.cat):
        return {kind for piece in support.cseq for kind in _kinds(piece)}
    return {bool(getattr(support, "is_discrete", False))}


def describe_leak(leak: Leak) -> str:
    """One sentence about where a value left torch."""
    return f"the value of {', '.join(sorted(leak.labels))} left torch by {leak.operation} at {leak.where}; later sites may depend on it"
