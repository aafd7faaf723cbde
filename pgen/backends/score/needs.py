"""What the score backend needs of a program: denoisers where it learns and infers, log probabilities elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pgen.capability import Capability, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import Paths, drawing, learned_factor, names_of, require
from pgen.structure import Structure

FLOW = "probability-flow"
"""The conversion by which a denoiser has a log probability, where the backend is to estimate it."""


@dataclass(frozen=True)
class Needs:
    """How the needs of the backend are met.

    Attributes:
        paths: conversions by site, to log probabilities of what is observed.
        matched: observed sites with a denoiser, trained by it.
        inferred: latents that observed values bear upon.
        joint: something is to be learned beside them, so that a guide draws them.
    """

    paths: Paths
    matched: tuple[str, ...]
    inferred: tuple[str, ...]
    joint: bool = False


def needs(structure: Structure, via: Mapping[str, str], weighed: str) -> Needs | Refusal:
    """How the program can be served, or which site stands in the way.

    Args:
        structure: of the program.
        via: conversions to go through, by site.
        weighed: the conversion from a denoiser to a log probability.
    """
    refusal = learned_factor(structure)
    if refusal is not None:
        return refusal
    able = [s.name for s in structure if Capability.DENOISER in s.capabilities]
    if not able:
        return Refusal(
            next(iter((*structure.observed, *structure.sites)), None),
            Capability.DENOISER.value,
            "no site of the program has a denoiser: pgen.distributions.Diffusion gives a site one",
        )
    matched = tuple(s for s in structure.observed if s in able)
    inferred = tuple(s for s in structure.latents if s in structure.evidenced)
    joint = bool(inferred) and any(site.params for site in structure)
    stops = _undrawable if joint else _undenoised
    for name in inferred:
        refusal = stops(structure, name)
        if refusal is not None:
            return refusal
    usual = dict.fromkeys(able, weighed)
    latent = (Capability.LOG_PROB,) if joint else ()
    paths = require(structure, latent, (Capability.LOG_PROB,), {**usual, **via})
    return paths if isinstance(paths, Refusal) else Needs(paths, matched, inferred, joint)


def _undenoised(structure: Structure, name: str) -> Refusal | None:
    """Why a latent cannot be inferred along noise levels, if it cannot."""
    site = structure.sites[name]
    if Capability.DENOISER not in site.capabilities:
        why = (
            f"data bear upon the latent {name!r} ({site.distribution}), and it can only be drawn or weighed: "
            "latents are inferred here along noise levels, which takes a denoiser; observe it, or sum it out"
        )
        return Refusal(name, Capability.DENOISER.value, why)
    if getattr(site.support, "is_discrete", False):
        why = f"the latent {name!r} ({site.distribution}) takes whole numbers, which are not what is denoised, only seen through"
        return Refusal(name, "real values", why)
    above = [p for p in site.parents if p in structure.latents]
    if above:
        why = f"the law of the latent {name!r} depends on the latent {above[0]!r}, so that they cannot be denoised side by side"
        return Refusal(name, "a law that no other latent changes", why)
    return None


def _undrawable(structure: Structure, name: str) -> Refusal | None:
    """Why no guide whose draws have a path can be made for a latent, if none can."""
    site = structure.sites[name]
    if site.discrete:
        why = (
            f"something is to be learned beside the latent {name!r} ({site.distribution}), so that a guide draws it, and draws "
            "of discrete latents have no path to follow; observe it, or sum it out in the program"
        )
        return Refusal(name, "a continuous support", why)
    return None


def offer(structure: Structure, found: Needs, *, flow: bool, scored: bool, by: str = "denoising") -> Offer:
    """What is answered, and how exactly.

    Args:
        structure: of the program.
        found: how the needs are met.
        flow: whether densities are solved for, not bounded.
        scored: whether the denoisers have scores.
        by: what they are trained by.
    """
    answers: dict[Query, Exactness] = {}
    drawn = drawing(structure, found.paths)
    if drawn is not None and not structure.factors:
        answers[Query.SAMPLE] = drawn[1]
    if scored:
        answers[Query.LOG_PROB] = Exactness.UNNORMALIZED if structure.factors else most_exact(flow)
        if found.joint and not structure.factors:
            answers[Query.LOG_PROB] = Exactness.LOWER_BOUND
    if scored and (structure.latents or len(structure.observed) > 1):
        answers[Query.POSTERIOR] = Exactness.ESTIMATE
    rank = Rank.IDEAL if found.matched or found.inferred else Rank.POSSIBLE
    return Offer(
        answers, rank, _why(structure, found, scored, by), names_of(drawn[0] if drawn else found.paths)
    )


def most_exact(flow: bool) -> Exactness:
    """How exact a log probability can be: an estimate by the probability flow, or a bound."""
    return Exactness.ESTIMATE if flow else Exactness.LOWER_BOUND


def _why(structure: Structure, found: Needs, scored: bool, by: str) -> str:
    parts = []
    if found.matched:
        parts.append(
            f"{', '.join(found.matched)} trained by {'consistency' if by == 'consistency' else 'denoising'}"
        )
    rest = [s for s in structure.observed if s not in found.matched]
    if rest:
        parts.append(f"{', '.join(rest)} by log probability")
    if found.joint:
        parts.append(f"{', '.join(found.inferred)} drawn by a guide that is learned beside them")
    elif found.inferred:
        parts.append(f"{', '.join(found.inferred)} inferred along noise levels")
    if not scored and found.matched:
        parts.append("no score is learned, so there is no density and no posterior")
    return "; ".join(parts) or "draws follow the reverse equations; nothing is observed"
