"""What an amortized guide is made of, decided before any network: order, inputs, codes and scales."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import Tensor

from pgen.algorithms.inversion import Inverse, Order, invert
from pgen.guides.evidence import INPUT, Probe
from pgen.guides.features import Features, Unconstrain, centre, matrix, robust_centre
from pgen.guides.gather import Source
from pgen.guides.layout import Layout
from pgen.structure import Structure

Globals = Literal["free", "pooled"]
_MAX_LINKS = 4_000_000  # weights of one linear map between global latents


@dataclass(frozen=True)
class Plan:
    """The decisions behind a guide.

    Attributes:
        structure: of the program.
        probe: data and draws that it is scaled by.
        layout: plates of every site and argument.
        inverse: order of the latents, and what each is drawn given.
        free: latents with free parameters; they depend linearly on each other and read no data.
        codes: bijections of the continuous latents.
        moments: centre and unit of the prior of each continuous latent, unconstrained.
    """

    structure: Structure
    probe: Probe
    layout: Layout
    inverse: Inverse[str]
    free: frozenset[str]
    codes: Mapping[str, Unconstrain]
    moments: Mapping[str, tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        structure: Structure,
        probe: Probe,
        arguments: Collection[str],
        marginalised: Collection[str],
        globals_: Globals,
        order: Order,
    ) -> Plan:
        """Decide, from a program's structure.

        Raises:
            ProgramError: a continuous latent has a support that no guide can be made for.
        """
        layout = Layout.of(structure, probe)
        latents = [name for name in structure.latents if name not in marginalised]
        free = frozenset(n for n in latents if globals_ == "free" and not layout.is_local(n))
        sites = structure.sites
        codes = {n: Unconstrain(sites[n], structure) for n in latents if not sites[n].discrete}
        moments = {n: robust_centre(matrix(code.flat(probe.draws[n]), 1)) for n, code in codes.items()}
        inverse = _inverted(structure, arguments, latents, free, layout, order)
        return Plan(structure, probe, layout, _linked(inverse, free, layout, codes), free, codes, moments)

    def by_element(self, name: str) -> tuple[Tensor, Tensor]:
        """Centre and unit [copies, K] of the prior of a latent with free parameters, for each of its elements."""
        slots = self.layout.slots
        plates = sorted(self.layout.plates[name], key=lambda p: slots[p].dim)
        return self.layout.by_element(self.codes[name].flat(self.probe.laws[name]), plates)

    def reads_residual(self, name: str, parent: str) -> bool:
        """Whether a latent reads the noise behind a parent in place of its value."""
        return name in self.free and parent in self.codes

    def encoded(self) -> list[str]:
        """What is read as it is by some latent, in the order of drawing."""
        parents = self.inverse.parents
        pairs = [(n, p) for n in self.inverse.order for p in parents[n] if not self.reads_residual(n, p)]
        return list(dict.fromkeys(p for _, p in pairs))

    def features(self, name: str) -> Features:
        """The features of one input, standardised by the data (if observed) or by the prior (latents)."""
        sites = self.structure.sites
        if name in self.codes:
            features = Features(sites[name].event_shape, unconstrain=self.codes[name])
            features.standardise(*self.moments[name])
            return features
        if name in sites:
            site = sites[name]
            value = self.probe.seen.observed[name] if site.observed else self.probe.draws[name]
            missing = name in self.structure.missing
            features = Features(site.event_shape, support=site.support, missing=missing)
        else:
            value = self.probe.seen.observed[name]
            features = Features(value.shape[self.layout.leading[name] :], dtype=value.dtype)
        features.standardise(*centre(matrix(value.to(features.loc.dtype), features.event_dim)))
        return features

    def sources(self, name: str, features: Mapping[str, int]) -> list[Source]:
        """The inputs of one latent, given how many features what is read as it is has."""
        return [
            Source(
                parent,
                frozenset(self.layout.plates[parent]),
                self.codes[parent].numel if self.reads_residual(name, parent) else features[parent],
            )
            for parent in self.inverse.parents[name]
        ]

    def folded(self, name: str, sources: Sequence[Source]) -> tuple[frozenset[str], frozenset[str]]:
        """The plates along which a latent has outputs for each element, and those read by position."""
        if name in self.free:
            return frozenset(self.layout.slots), frozenset(self.layout.slots)
        carried = self.layout.rows.union(*(source.plates for source in sources)) - self.layout.positional
        return frozenset(self.layout.plates[name]) - carried, self.layout.positional


def global_unit(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and unit of a parameter whose posterior is likely much narrower than a vague prior."""
    return loc, torch.minimum(scale, scale.sqrt())


def _inverted(
    structure: Structure,
    arguments: Collection[str],
    latents: Sequence[str],
    free: Collection[str],
    layout: Layout,
    order: Order,
) -> Inverse[str]:
    """Invert the program's graph, arguments as observed nodes; latents with free parameters read no data."""
    graph = nx.DiGraph(structure.graph)
    edges = [(f"{INPUT}{name}", site.name) for site in structure for name in site.inputs if name in arguments]
    graph.add_edges_from(edges)
    given = [*structure.observed, *structure.factors, *dict.fromkeys(name for name, _ in edges)]
    ranks = {n: len(layout.plates[n]) + 64 * layout.is_local(n) for n in latents}
    found = invert(graph, latents, given, order=order, rank=ranks)
    values = {*latents, *given}.difference(structure.factors)
    parents = {n: [p for p in found.parents[n] if p in (free if n in free else values)] for n in found.order}
    return Inverse(found.order, {n: tuple(p) for n, p in parents.items()})


def _linked(
    inverse: Inverse[str], free: Collection[str], layout: Layout, codes: Mapping[str, Unconstrain]
) -> Inverse[str]:
    """Leave out, aloud, dependence between free latents that would need an unreasonably large linear map."""

    def size(name: str) -> int:
        copies = torch.Size(layout.slots[p].length for p in layout.plates[name]).numel()
        return copies * (codes[name].numel if name in codes else 1)

    parents = dict(inverse.parents)
    for name in free:
        left = [p for p in parents[name] if size(name) * size(p) > _MAX_LINKS]
        if left:
            parents[name] = tuple(p for p in parents[name] if p not in left)
            warnings.warn(
                f"site {name!r} is guided independently of {', '.join(map(repr, left))}: a linear map "
                f"between them would have more than {_MAX_LINKS} weights",
                UserWarning,
                stacklevel=5,
            )
    return Inverse(inverse.order, parents)
