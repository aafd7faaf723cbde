"""What MCMC needs of a program: densities at every site, and latents that a kernel can move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributions import biject_to, constraints

from pgen.capability import Capability, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import Paths, drawing, learned_factor, names_of, require, weakest
from pgen.conversion import exactness_of
from pgen.factoring import outside_plates
from pgen.structure import Site, Structure

_MANY = 500  # elements of latents that rows have: beyond, each row is better approximated by itself


@dataclass(frozen=True)
class Needs:
    """How each latent is treated.

    Attributes:
        paths: conversions by site.
        moved: continuous latents.
        summed: finite latents that are summed out, and drawn afterwards given the others.
        flipped: discrete latents that are moved in turn with the continuous ones, and why they are not summed out.
        constants: conversions to a normalised density, of sites that are moved without one.
    """

    paths: Paths
    moved: tuple[str, ...]
    summed: tuple[str, ...]
    flipped: Mapping[str, str]
    constants: Paths

    @property
    def kind(self) -> Exactness:
        """How exact densities are, constants included where they can be had."""
        return weakest(exactness_of(self.constants.get(site, path)) for site, path in self.paths.items())


def needs(
    structure: Structure, via: Mapping[str, str], *, enumerated: bool = True, subsampled: bool = False
) -> Needs | Refusal:
    """How the latents of a program can be sampled, or which site stands in the way.

    Args:
        structure: of the program.
        via: conversions to go through, by site.
        enumerated: whether finite latents are summed out where they can be.
        subsampled: whether a plate may draw its rows at random.
    """
    refusal = learned_factor(structure)
    if refusal is not None:
        return refusal
    learned = [name for site in structure for name in site.params] or list(structure.params)
    if learned:
        return Refusal(
            next((s.name for s in structure if s.params), None),
            "a prior for its learned tensors",
            f"the program learns {learned[0]}{' and others' if len(set(learned)) > 1 else ''}; MCMC integrates over latents and optimises "
            "nothing: make them sites (pyro.nn.PyroSample) or hold them fixed, as the program of a fit does: "
            "pgen.fit(fitted.program, data, 'mcmc')",
        )
    if not structure.latents:
        return Refusal(
            None,
            "a latent site",
            "nothing is left to sample: every site is observed",
        )
    paths = _densities(structure, via)
    if isinstance(paths, Refusal):
        return paths
    for site in structure:
        refusal = _unusable(site, structure, paths)
        if refusal is not None:
            return refusal
    drawn = [p.name for p in structure.plates.values() if p.subsampled and not p.chosen]
    if drawn and not subsampled:
        return Refusal(
            None,
            "all of its rows",
            f"plate {drawn[0]!r} looks at a random part of its rows, so that the density is another one at every call; "
            "use all rows, or kernel='sgld' or 'sghmc'",
        )
    moved: list[str] = []
    summed: list[str] = []
    flipped: dict[str, str] = {}
    finite = [s for s in structure.latents if structure.sites[s].enumerable] if enumerated else []
    lost = outside_plates(structure, finite)
    for name in structure.latents:
        site = structure.sites[name]
        if not site.discrete:
            refusal = _immovable(site)
            if refusal is not None:
                return refusal
            moved.append(name)
        elif site.enumerable and enumerated and name not in lost and not _changing(site, structure):
            summed.append(name)
        elif site.enumerable or _counted(site):
            flipped[name] = _why_not_summed(site, lost.get(name), _changing(site, structure))
        else:
            return Refusal(
                name,
                "elements that are single numbers, or a list of its values",
                f"{site.distribution} has support {site.support}: neither can its values be listed, nor can it be moved by "
                "whole numbers, nor by a gradient; write it as sites of single counts, or sum it out in the program",
            )
    return Needs(paths, tuple(moved), tuple(summed), flipped, _constants(structure, paths))


def _densities(structure: Structure, via: Mapping[str, str]) -> Paths | Refusal:
    """The conversions of sites that have no density by themselves, and of those that the user named."""
    own = {Capability.LOG_PROB, Capability.LOG_DENSITY}
    asked = {s.name for s in structure if not s.factor and (s.name in via or not own & s.capabilities)}
    loose = {
        s.name
        for s in structure
        if not s.factor and not s.improper and Capability.LOG_PROB not in s.capabilities
    }
    if not asked and not via and not loose:
        return {}
    needed = [Capability.LOG_DENSITY]
    # A ratio of two random numbers accepts nothing rightly.
    paths = require(structure, latent=needed, observed=needed, via=via, random=False)
    if isinstance(paths, Refusal):
        return paths
    kept = {s: p for s, p in paths.items() if s in asked}
    for name in loose:  # moves need no constant
        path = kept.get(name, paths.get(name, ()))
        if not any(c.gives is Capability.LOG_PROB for c in path):
            kept[name] = (*path, structure.conversions.named("unnormalised"))
    return kept


def _constants(structure: Structure, paths: Paths) -> Paths:
    """How log Z can be had of sites that are moved without it, where it can; evidence needs it."""
    found = {}
    for name, path in paths.items():
        site = structure.sites[name]
        if exactness_of(path) is Exactness.UNNORMALIZED:
            way = structure.conversions.path(
                site.capabilities, Capability.LOG_PROB, random=False, at=(site, structure)
            )
            if way:
                found[name] = way
    return found


def offer(structure: Structure, found: Needs, kernel: str, evidence: bool) -> Offer:
    """What is answered, and how exactly."""
    answers: dict[Query, Exactness] = {}
    drawn = drawing(structure, found.paths)
    if drawn is not None:
        answers[Query.SAMPLE] = drawn[1]
    worst = found.kind
    if evidence and structure.observed:
        unnormalised = structure.weighted or worst is Exactness.UNNORMALIZED
        answers[Query.LOG_PROB] = Exactness.UNNORMALIZED if unnormalised else Exactness.ESTIMATE
    answers[Query.POSTERIOR] = Exactness.ESTIMATE
    local = [s for s in found.moved if structure.local(s)]
    elements = sum(
        math.prod(structure.sites[s].batch_shape + structure.sites[s].event_shape) for s in found.moved
    )
    known = all(  # a constant moves nothing
        exactness_of(path) in (Exactness.EXACT, Exactness.UNNORMALIZED) for path in found.paths.values()
    )
    small = known and not found.flipped and (not local or elements <= _MANY)
    rank = Rank.IDEAL if small and structure.observed else Rank.POSSIBLE
    return Offer(answers, rank, _why(found, kernel, local), names_of(drawn[0] if drawn else found.paths))


def _why(found: Needs, kernel: str, local: list[str]) -> str:
    parts = []
    if found.moved:
        parts.append(f"{', '.join(found.moved)} moved by {kernel}, exact in the long run")
    if found.summed:
        parts.append(f"{_listed(found.summed)} summed out exactly, then drawn given the rest")
    for why in dict.fromkeys(found.flipped.values()):
        names = tuple(name for name, other in found.flipped.items() if other == why)
        parts.append(f"{_listed(names)} {why}")
    if local:
        parts.append(
            f"{', '.join(local)} have values in every row, so that the vector is as long as the data"
        )
    return "; ".join(parts)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _unusable(site: Site, structure: Structure, paths: Paths) -> Refusal | None:
    """A density known up to a constant serves only where that constant never changes."""
    firm = [c for c in paths.get(site.name, ()) if c.exactness is not Exactness.UNNORMALIZED]
    able = site.capabilities | {c.gives for c in firm}
    if site.factor or Capability.LOG_PROB in able:
        return None
    moving = [p for p in site.parents if p in structure.latents]
    if not moving:
        return None
    return Refusal(
        site.name,
        "a normalised density",
        f"{site.distribution} is known up to a constant that depends on the latent {moving[0]!r}: moving {moving[0]!r} changes "
        "it, and the acceptance would be wrong",
    )


def _counted(site: Site) -> bool:
    """Whether a discrete site is made of single whole numbers."""
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    drawable = {Capability.SAMPLE, Capability.LOG_PROB} <= site.capabilities
    return drawable and bool(support.is_discrete) and not support.event_dim


def _changing(site: Site, structure: Structure) -> str | None:
    """A latent on which the values of a finite site depend."""
    return next((p for p in site.support_parents if p in structure.latents), None)


def _why_not_summed(site: Site, lost: Refusal | None, changing: str | None) -> str:
    if changing is not None:
        return (
            f"moved in turn by whole numbers (Metropolis), not summed out: its values depend on {changing!r}"
        )
    if lost is not None:
        return f"drawn in turn, each given all others (Gibbs), not summed out: {lost.why.split(';')[0]}"
    if site.enumerable:
        return "drawn in turn, each given all others (Gibbs), as enumerate='none' says"
    if site.event_shape:
        return "moved in turn, element by element, each given all others: its law is that of all its elements together"
    return "moved in turn by whole numbers (Metropolis), not summed out: there is no list of its values"


def _immovable(site: Site) -> Refusal | None:
    try:
        biject_to(site.support)
    except NotImplementedError:
        return Refusal(
            site.name,
            "a bijection from the real numbers",
            f"{site.distribution} has support {site.support}, onto which torch knows no map from unconstrained numbers; "
            "register one with torch.distributions.biject_to.register",
        )
    return None
