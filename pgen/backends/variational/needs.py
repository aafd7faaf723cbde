"""What the variational backend needs of a program, and what it offers in return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgen.capability import Exactness, Offer, Query, Rank, Refusal
from pgen.choice import answering, drawing, learned_factor, learning, names_of, undrawable, weakest
from pgen.conversion import Conversion, exactness_of
from pgen.errors import PgenError
from pgen.factoring import outside_plates
from pgen.guides.features import Unconstrain, levels
from pgen.structure import Site, Structure

_JOINT = ("full-rank", "low-rank", "flow")  # guides that are one law of all latents
_DEAF = ("mean-field", *_JOINT)  # guides that read no data


@dataclass(frozen=True)
class Needs:
    """How the needs of the backend are met.

    Attributes:
        paths: conversions by site.
        learned: conversions by site while something is learned, where they are others.
        drawn: latents that the guide draws (as far as the structure tells).
        summed: latents that can be summed out exactly.
    """

    paths: Mapping[str, tuple[Conversion, ...]]
    learned: Mapping[str, tuple[Conversion, ...]]
    drawn: tuple[str, ...]
    summed: tuple[str, ...]


def needs(
    structure: Structure,
    via: Mapping[str, Any],
    *,
    guide: str | None,
    enumerated: bool,
    simulated: bool,
    valued: bool = False,
) -> Needs | Refusal:
    """A log probability at every site, and a guide for every latent that is not summed out.

    Args:
        structure: of the program.
        via: conversions to go through, by site.
        guide: its kind; None: the user's own.
        enumerated: whether finite latents are summed out.
        simulated: whether the guide is trained on simulations.
        valued: whether the objective weighs draws by log probabilities, not only by their gradients.
    """
    for refusal in (learned_factor(structure), undrawable(structure, via)):
        if refusal is not None:
            return refusal
    paths = answering(structure, via)
    if isinstance(paths, Refusal):
        return paths
    learned = learning(structure, via, paths)
    if isinstance(learned, Refusal):
        return learned
    for name, path in learned.items():
        refusal = _misweighed(name, structure, path, valued)
        if refusal is not None:
            return refusal
    # What a user's guide leaves to be summed out is known only once it has run.
    summed = summable(structure) if guide and enumerated else ()
    drawn = tuple(s for s in structure.latents if s not in summed)
    for name in drawn if guide else ():
        refusal = _unguided(structure.sites[name], structure, guide or "")
        if refusal is not None:
            return refusal
    if simulated and drawn and guide in _DEAF:
        return Refusal(
            drawn[0],
            "a guide that reads the data",
            f"objective='forward-kl' trains a guide on simulations, each with data of its own, and guide={guide!r} reads "
            "no data, so that it could only learn the prior; use guide='amortized'",
        )
    if guide in _JOINT and drawn and all(map(structure.local, drawn)):
        return Refusal(
            drawn[0],
            "a latent that all rows share",
            f"guide={guide!r} is one joint law of the latents of all rows, while these rows are independent and each is to "
            "have a bound of its own; use guide='amortized' with family='full', 'low-rank' or 'flow', or 'mean-field'",
        )
    if simulated and not drawn:
        return Refusal(
            None,
            "a latent that the guide draws",
            "objective='forward-kl' trains a guide alone, and here is none to train",
        )
    return Needs(paths, learned, drawn, summed)


def summable(structure: Structure) -> tuple[str, ...]:
    """Latents that are finite and stay in their plates, as far as the structure tells."""
    finite = [s for s in structure.latents if structure.sites[s].enumerable]
    lost = outside_plates(structure, finite)
    return tuple(s for s in finite if s not in lost)


def offer(
    structure: Structure, found: Needs, *, bound: bool, simulated: bool, via: Mapping[str, Any]
) -> Offer:
    """What is answered, and how exactly."""
    answers: dict[Query, Exactness] = {}
    drawn = drawing(structure, found.paths, via)
    if drawn is not None:
        answers[Query.SAMPLE] = drawn[1]
    kinds = [exactness_of(path) for path in found.paths.values()]
    if structure.factors:
        kinds.append(Exactness.UNNORMALIZED)
    asked = Exactness.LOWER_BOUND if bound else Exactness.ESTIMATE
    if not found.drawn and not structure.factors:
        asked = Exactness.EXACT if structure.observed else asked
    if not any(_floats(structure, name, path) for name, path in found.paths.items()):
        answers[Query.LOG_PROB] = weakest([asked, *kinds])
    inferred = Exactness.ESTIMATE if found.drawn or structure.factors else Exactness.EXACT
    answers[Query.POSTERIOR] = answers[Query.MARGINALS] = inferred
    paths = drawn[0] if drawn else found.paths
    why = _why(structure, found, simulated)
    return Offer(answers, _rank(structure, found), why, names_of(paths), names_of(found.learned))


def _rank(structure: Structure, found: Needs) -> Rank:
    smooth = all(not structure.sites[s].discrete for s in found.drawn)
    return Rank.SUITED if found.drawn and smooth else Rank.POSSIBLE


def _why(structure: Structure, found: Needs, simulated: bool) -> str:
    if not structure.latents:
        return "nothing is latent, so that the bound is the likelihood itself"
    parts = []
    if found.summed:
        parts.append(f"{', '.join(found.summed)} summed out exactly")
    local = [s for s in found.drawn if structure.local(s)]
    shared = [s for s in found.drawn if s not in local]
    if local:
        parts.append(f"{', '.join(local)} read off each row by a guide")
    if shared:
        parts.append(
            f"{', '.join(shared)} {'read off the data' if simulated else 'given one approximate posterior, that of the fitted data'}"
        )
    rough = [s for s in found.drawn if structure.sites[s].discrete]
    if rough:
        parts.append(f"{', '.join(rough)} trained by the score function")
    if not structure.observed:
        parts.append(
            "nothing is observed"
            + (", leaves are simulated" if simulated else ", so that there is nothing to fit")
        )
    return "; ".join(parts)


def _unguided(site: Site, structure: Structure, guide: str) -> Refusal | None:
    """Why no guide can be made for a latent, if none can."""
    if site.discrete and guide in ("auto", "amortized"):
        if levels(site.support) is not None:
            return None
        why = (
            f"{site.distribution} has no finite list of values, so that a guide can neither weigh them one "
            "by one nor follow a path; give a guide of your own that draws it, or write it so that it is "
            "summed out"
        )
        return Refusal(site.name, "a finite or continuous support", why)
    if site.discrete:
        why = (
            f"guide={guide!r} is a law of real vectors, and {site.distribution} is discrete; use "
            "guide='amortized', or leave it to be summed out (enumerate='auto') where its support is finite"
        )
        return Refusal(site.name, "a continuous support", why)
    try:
        Unconstrain(site, structure)
    except PgenError as error:
        return Refusal(site.name, "a support that a guide can be made for", str(error))
    return None


def _floats(structure: Structure, name: str, path: Any) -> bool:
    """Whether the constant that is missing from a density depends on a latent: an average over that latent means nothing."""
    above = set(structure.sites[name].parents).intersection(structure.latents)
    return bool(above) and exactness_of(path) is Exactness.UNNORMALIZED


def _misweighed(name: str, structure: Structure, path: Any, valued: bool) -> Refusal | None:
    """Why a surrogate cannot stand at a site: the constant that it leaves out differs between draws that are weighed."""
    site = structure.sites[name]
    above = [p for p in site.parents if p in structure.latents]
    if exactness_of(path) is not Exactness.SURROGATE or not above:
        return None
    finite = [p for p in above if structure.sites[p].discrete]
    if not finite and not valued:
        return None
    why = (
        f"{site.distribution} at {name!r} is learned by {path[-1].name}, which has the gradient of the log probability and not its "
        f"value, and its constant depends on {(finite or above)[0]!r}, "
    )
    more = (
        "which is discrete: draws of it are weighed by that value"
        if finite
        else "whose draws are weighed by that value here"
    )
    return Refusal(
        name,
        "a log_prob whose value is right",
        why
        + more
        + "; use objective='elbo', evaluate='bound', correction='none' and continuous latents above it",
    )
