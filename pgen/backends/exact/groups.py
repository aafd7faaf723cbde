"""Which latents of a program are tied together, and what could integrate each group exactly."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import networkx as nx
from torch.distributions import constraints

from pgen.algorithms.conjugacy import FAMILIES
from pgen.algorithms.factor_graph import Intractable, plan_scopes
from pgen.capability import Refusal
from pgen.factoring import outside_plates, plate_name
from pgen.structure import Site, Structure, describe_leak

Method = Literal["finite", "gaussian", "conjugate"]

#: Laws of latents whose log density is quadratic in the latent and in its location.
GAUSSIAN = frozenset({"Normal", "MultivariateNormal", "LowRankMultivariateNormal"})
#: Laws of observed sites that may be quadratic in a latent. Whether they are is for the numbers to say.
_MAY_BE_QUADRATIC = GAUSSIAN | {
    "GaussianHMM",
    "GaussianMRF",
    "LinearHMM",
    "LogNormal",
    "TransformedDistribution",
    "ImproperUniform",
    "factor",
}


@dataclass(frozen=True)
class Group:
    """Latents that some site ties together, directly or through others.

    Attributes:
        latents: in program order.
        sites: the sites whose laws involve them: themselves, and the observed sites and factors among their
            children.
        method: what can sum or integrate them, as far as their laws tell.
    """

    latents: tuple[str, ...]
    sites: frozenset[str]
    method: Method


def predicted(structure: Structure, given: Collection[str]) -> frozenset[str]:
    """Latents that no observed value bears upon, and that can yet join the group of their parents."""
    found: set[str] = set()
    for name in structure.latents:
        if name in given:
            continue
        parents = [p for p in structure.sites[name].parents if p in structure.latents]
        if any(p not in given and p not in found for p in parents):
            continue
        kind = _kind(structure.sites[name])
        if (
            kind is not None
            and kind != "conjugate"
            and all(_kind(structure.sites[p]) == kind for p in parents)
            and (kind != "finite" or not outside_plates(structure, parents, (name,)))
        ):
            found.add(name)
    return frozenset(found)


def groups_of(
    structure: Structure, latents: Collection[str], max_table: int, held: Collection[str] = ()
) -> list[Group] | Refusal:
    """Split latents into groups, or say which of them no method can integrate, and why.

    Other latents integrate to one, except those `held` at a value, whose laws count like those of observed
    sites.
    """
    tied = nx.Graph()
    scopes = {s.name: [p for p in (*s.parents, s.name) if p in latents] for s in structure}
    for scope in scopes.values():
        tied.add_nodes_from(scope)
        nx.add_path(tied, scope)
    number = {name: i for i, names in enumerate(nx.connected_components(tied)) for name in names}
    members: dict[int, list[str]] = {}
    sites: dict[int, list[str]] = {}
    for site in structure:
        if site.name in number:
            members.setdefault(number[site.name], []).append(site.name)
        if scopes[site.name] and (site.name in number or site.observed or site.name in held):
            sites.setdefault(number[scopes[site.name][0]], []).append(site.name)
    groups = []
    for i, ordered in members.items():
        method = _method(structure, tuple(ordered), frozenset(sites[i]))
        if isinstance(method, Refusal):
            return method
        groups.append(Group(tuple(ordered), frozenset(sites[i]), method))
    refusal = _too_large(structure, [g for g in groups if g.method == "finite"], max_table)
    return groups if refusal is None else refusal


def _kind(site: Site) -> Method | None:
    if site.enumerable:
        return "finite"
    if site.distribution in GAUSSIAN and _is_real(site):
        return "gaussian"
    return "conjugate" if site.distribution in FAMILIES else None


def _is_real(site: Site) -> bool:
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _method(structure: Structure, latents: tuple[str, ...], sites: frozenset[str]) -> Method | Refusal:
    kinds = {name: _kind(structure.sites[name]) for name in latents}
    if set(kinds.values()) == {"finite"}:
        lost = _followed(structure, latents)
        if lost is None:
            outside = outside_plates(structure, latents, sites)
            lost = next((outside[name] for name in latents if name in outside), None)
        return "finite" if lost is None else lost
    odd = next(name for name in latents if kinds[name] != "finite")
    if "finite" in kinds.values():
        finite = next(name for name in latents if kinds[name] == "finite")
        return Refusal(
            odd,
            "a finite support",
            f"{structure.sites[odd].distribution} at {odd!r} is tied to the finite latent {finite!r}, and "
            "sums over values do not mix with integrals here",
        )
    if set(kinds.values()) == {"gaussian"}:
        for name in structure.sites:
            site = structure.sites[name]
            if name in sites and site.distribution not in _MAY_BE_QUADRATIC:
                return Refusal(
                    name,
                    "a Gaussian law",
                    f"{site.distribution} at {name!r} depends on the Gaussian latent {latents[0]!r}, so the "
                    "posterior is not Gaussian",
                )
            if name in sites and name in structure.bent:
                latent = next((p for p in (*site.parents, name) if p in latents), latents[0])
                return Refusal(
                    latent,
                    "linear use",
                    f"the log density of {name!r} is not quadratic in the Gaussian latent {latent!r}, so that it "
                    "cannot be integrated in closed form",
                )
        return "gaussian"
    if None in kinds.values():
        odd = next(name for name in latents if kinds[name] is None)
        law = structure.sites[odd].distribution
        return Refusal(
            odd,
            "a law that can be integrated",
            f"{law} is neither finite nor Gaussian, nor a conjugate family ({', '.join(FAMILIES)})",
        )
    if len(latents) > 1:
        odd = next(name for name in latents if kinds[name] == "conjugate")
        law = structure.sites[odd].distribution
        others = [name for name in latents if name != odd]
        return Refusal(
            odd,
            "independence of the other latents",
            f"{law} at {odd!r} could be conjugate, but it is tied to {', '.join(others)}",
        )
    return "conjugate"


def _followed(structure: Structure, latents: tuple[str, ...]) -> Refusal | None:
    for leak in structure.leaks:
        lost = [name for name in latents if name in leak.labels]
        if lost:
            return Refusal(
                lost[0],
                "uses that stay in torch",
                f"{describe_leak(leak)}. Index a tensor by it, or use torch.where: all values are tried",
            )
    return None


def _too_large(structure: Structure, finite: list[Group], max_table: int) -> Refusal | None:
    """Plan the sums from names and sizes alone. Rows of the data are kept apart and so cost nothing here."""
    latents = {name for group in finite for name in group.latents}
    if not latents:
        return None
    variables = {name: _plates(structure, name) for name in latents}
    scopes: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    for group in finite:
        for name in group.sites:
            site = structure.sites[name]
            scope = [p for p in (*site.parents, name) if p in latents]
            scopes.append((*_plates(structure, name), *scope))
            sizes |= {other: structure.sites[other].cardinality or 1 for other in scope}
            sizes |= {plate: structure.plates[plate].size for plate in _plates(structure, name)}
    rows = structure.data_plate
    if rows in sizes:
        sizes[rows] = 1
    keep = () if rows not in sizes or structure.tied else (rows,)
    try:
        plan_scopes(tuple(scopes), tuple(variables.items()), tuple(sizes.items()), keep, (), max_table)
    except Intractable as error:
        return Refusal(error.variables[0] if error.variables else None, "a sum of bearable size", str(error))
    return None


def _plates(structure: Structure, name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plate_name(structure, plate) for plate in structure.sites[name].plates))
