"""What went wrong in a run of Markov chains, how badly, and what to try: one sentence for each finding, none for good runs.

Thresholds are those in use (R-hat 1.01, 400 effective draws, E-BFMI 0.3), each with an allowance for chance: a
number that is the worst of a thousand coordinates, or that comes from short chains, passes a fixed threshold now
and then although nothing is wrong. R-hat must also exceed what agreeing chains of the same memory give with
probability `ALARM` over all coordinates; the least of many ESS is taken a tenth below 400; divergences are
located only where their ranks say so beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pgen.metrics.chains import Diagnosis, e_bfmi, r_hat, r_hat_by_chance
from pgen.metrics.ranks import in_order

R_HAT = 1.01
ESS = 400
E_BFMI = 0.3
KHAT = 0.7
ALARM = 1e-3
"""Probability that a statement about all coordinates together is made by chance."""

_FEW_LABELS = 50
_APART, _TOGETHER = 1.2, 1.1  # R-hat of elements that switch labels, and of the same in order
_LOCATED = 256  # divergent draws looked at, evenly over all


@dataclass(frozen=True)
class Evidence:
    """What advice is given on.

    Attributes:
        sites: draws `[chains, draws, scalars]` by site.
        stats: statistics `[chains, draws]`, by their ArviZ names.
        found: what `pgen.metrics.chains.diagnose` says of each site.
        markov: whether draws come from Markov chains, or else are independent.
        khat: Pareto shapes of importance weights, if there were any.
    """

    sites: Mapping[str, Tensor]
    stats: Mapping[str, Tensor]
    found: Mapping[str, Diagnosis]
    markov: bool = True
    khat: Tensor | None = None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Chains, and draws of each."""
        return tuple(next(iter(self.sites.values())).shape[:2]) if self.sites else (0, 0)  # type: ignore[return-value]

    @cached_property
    def coordinates(self) -> tuple[tuple[str, int], ...]:
        """Every scalar, as its site and its place in there."""
        return tuple((s, i) for s, f in self.found.items() for i in range(f.mean.numel()))

    @cached_property
    def disagreeing(self) -> Tensor:
        """Coordinates whose R-hat is too great, and greater than chance makes it, `[d]`."""
        r = self.every("r_hat")
        chance = r_hat_by_chance(self.every("ess_half"), self.shape[0], ALARM / max(1, len(r)))
        return (r > R_HAT) & ((r > chance) | r.isinf())

    def every(self, field: str) -> Tensor:
        """A field of the diagnosis, of all coordinates in one row `[d]`."""
        return torch.cat([getattr(f, field).reshape(-1) for f in self.found.values()])

    def name(self, place: int) -> str:
        """What a coordinate is called."""
        site, index = self.coordinates[place]
        return coordinate(site, index, self.found[site].mean.shape)

    def draws(self, place: int) -> Tensor:
        """Draws of a coordinate, `[chains, draws]`."""
        site, index = self.coordinates[place]
        return self.sites[site][..., index]


def coordinate(site: str, index: int, shape: Sequence[int]) -> str:
    """The name of one scalar of a site.

    >>> coordinate("w", 5, (2, 3)), coordinate("mu", 0, ())
    ('w[1, 2]', 'mu')
    """
    if not shape:
        return site
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index //= size
    return f"{site}[{', '.join(map(str, reversed(places)))}]"


def advise(evidence: Evidence) -> tuple[str, ...]:
    """Every sentence that there is to say, the gravest first."""
    checks = _FOR_CHAINS if evidence.markov else _FOR_ALL
    return tuple(sentence for check in checks for sentence in check(evidence)) if evidence.coordinates else ()


# --- values ---


def _not_finite(e: Evidence) -> Iterator[str]:
    for site, x in e.sites.items():
        bad = int((~x.isfinite()).any(-1).sum()) if x.is_floating_point() else 0
        if bad:
            yield (
                f"{bad:,} of {_count(e):,} draws of {site} are not finite: nothing can be said of it. Look for a log "
                "density that overflows, and at the transform of its support"
            )


def _constant(e: Evidence) -> Iterator[str]:
    moving = {s: bool((x != x[:1, :1]).any()) for s, x in e.sites.items()}
    for site, x in e.sites.items():
        # Whole numbers may well be certain, and parts of a site constant by its support.
        if any(moving.values()) and not moving[site] and x.numel() and not bool((x == x.round()).all()):
            yield (
                f"{site} has the same value in every draw, while other sites move: does the log density depend on it, "
                "and is its gradient cut (detach, round, .item())?"
            )


def _weights(e: Evidence) -> Iterator[str]:
    worst = -math.inf if e.khat is None else float(e.khat.max())
    if worst > KHAT:
        yield (
            f"k-hat of the importance weights is {worst:.2f} (above {KHAT}): a few draws carry the weight, and estimates "
            "are unreliable. Use a richer guide, or Markov chains"
        )


# --- chains ---


def _stuck(e: Evidence) -> Iterator[str]:
    still = torch.stack([(x == x[:, :1]).flatten(1).all(-1) for x in e.sites.values()]).all(0)
    rate = e.stats["acceptance_rate"].double().mean(-1) if "acceptance_rate" in e.stats else None
    if rate is not None:
        still &= rate < 0.05  # a discrete posterior may be certain, and its draws all equal
    where = still.nonzero()[:, 0].tolist()
    if where and e.shape[1] > 1:
        accepted = "" if rate is None else f" (acceptance {float(rate[still].mean()):.2f})"
        yield (
            f"{_chains(where, e.shape[0])} never moved{accepted}: every proposal was rejected. Take a smaller step size, "
            "warm up longer, or start elsewhere (where the gradient is finite)"
        )
    slow: list[int] = [] if rate is None else ((rate < 0.05) & ~still).nonzero()[:, 0].tolist()
    if slow:
        yield f"{_chains(slow, e.shape[0])} hardly moved (acceptance below 0.05): take a smaller step size or warm up longer"


def _diverged(e: Evidence) -> Iterator[str]:
    flags = e.stats.get("diverging")
    many = 0 if flags is None else int(flags.bool().sum())
    if flags is None or many <= 1e-4 * _count(e):
        return
    where = divergent_place(e, flags.bool())
    near = "" if where is None else f", near {where}"
    yield (
        f"{many:,} of {_count(e):,} draws diverged ({_percent(many / _count(e))}){near}: the posterior has a region of "
        "strong curvature that is not explored as it should be, and means are biased away from it. Reparameterise "
        "(pyro.infer.reparam.LocScaleReparam) or raise target_accept"
    )


def divergent_place(e: Evidence, flags: Tensor) -> str | None:
    r"""The end of a coordinate's distribution where flagged draws concentrate, in words; None where it could be chance.

    Of k draws that have nothing to do with a coordinate, the mean rank :math:`\bar u` has standard deviation
    :math:`1 / \sqrt{12 k}`. The most extreme coordinate counts, if its deviation is beyond the `ALARM` level
    for all of them.

    Args:
        e: the draws.
        flags: `[chains, draws]`.
    """
    chosen = flags.flatten().nonzero()[:, 0]
    chosen = chosen[:: max(1, math.ceil(len(chosen) / _LOCATED))]
    if len(chosen) < 5:
        return None
    ranks = []
    for x in e.sites.values():
        values = x.flatten(0, 1).double().T.contiguous()
        ordered, picked = in_order(values), values[:, chosen].contiguous()
        below = torch.searchsorted(ordered, picked) + torch.searchsorted(ordered, picked, right=True)
        ranks.append(below / (2 * ordered.shape[1]))
    u = torch.cat(ranks)
    score = (u.mean(-1) - 0.5) * math.sqrt(12 * len(chosen))
    place = int(score.abs().nan_to_num().argmax())
    if float(score[place].abs()) < _threshold(ALARM / (2 * len(u))):
        return None
    share, value = float(u[place].median()), float(e.draws(place).flatten()[chosen].double().median())
    name = e.name(place)
    if share < 0.5:
        return f"small {name} (half of them below its {_percent(share)} quantile, {value:.3g})"
    return f"large {name} (half of them above its {_percent(share)} quantile, {value:.3g})"


def _saturated(e: Evidence) -> Iterator[str]:
    if "reached_max_treedepth" in e.stats:
        share = float(e.stats["reached_max_treedepth"].double().mean())
        if share > 0.01:
            yield (
                f"{_percent(share)} of trajectories reached the greatest tree depth: no error, but each costs as many "
                "gradients as may be, and draws are more alike than they could be. Raise max_depth, warm up longer, use a "
                "dense scale, or reparameterise"
            )


def _disagree(e: Evidence) -> Iterator[str]:
    bad, half = e.disagreeing, e.every("ess_half")
    if not bool(bad.any()):
        return
    r = torch.where(bad, e.every("r_hat"), 0.0)
    worst = int(r.argmax())
    start = f"R-hat of {e.name(worst)} is {float(r[worst]):.2f} ({_above(bad, f'above {R_HAT}')}): chains disagree"
    if (labels := switched(e)) is not None:
        yield f"{start}. {labels}"
        return
    for place in r.argsort(descending=True)[: min(20, int(bad.sum()))].tolist():
        groups = groups_of_chains(e.draws(place).double()) if half[place] >= 10 else None
        if groups is not None:
            yield f"{start}. {_modes(e, place, groups)}"
            return
    halves = "halves of the chain" if e.shape[0] == 1 else "chains, or halves of them,"
    yield f"{start}; {halves} have not found the same law yet. Warm up and run longer, or reparameterise"


def switched(e: Evidence) -> str | None:
    """Says so if chains agree about each site once its elements are in order: they differ in which element is which.

    Exchangeable elements, such as the components of a mixture, have a mode for each of their orders. Each chain is in one
    of them, and nothing is wrong about it.
    """
    names: list[str] = []
    worst = 0.0
    for site, x in e.sites.items():
        whole = float(e.found[site].r_hat.nan_to_num(nan=0.0, posinf=math.inf).max())
        if not x.is_floating_point() or whole <= _APART:
            continue
        width = x.shape[-1]
        ordered = (
            math.inf if not 2 <= width <= _FEW_LABELS else float(r_hat(x.double().sort(-1).values).max())
        )
        if not ordered < _TOGETHER:
            return None
        names.append(site)
        worst = max(worst, ordered)
    if not names:
        return None
    return (
        f"Labels are switched: put in order, the elements of {' and of '.join(names)} agree (R-hat {worst:.2f}), so chains "
        "differ in which of them is which, and what does not depend on that can be trusted. Look at "
        f"{names[0]}.sort(-1), or tell the elements apart by their priors, or by a law that keeps them in order"
    )


def groups_of_chains(x: Tensor) -> list[list[int]] | None:
    """Groups of chains that are apart from each other, by where they are; None where there is one, or no pattern.

    Chains in order of their means are parted where two neighbours are further apart than twice the greater of
    their standard deviations. Stuck chains are left out; as many groups as chains (of four or more) are none.

    Args:
        x: draws `[chains, draws]` of one coordinate.
    """
    mean, sd = x.mean(-1), x.std(-1)
    moving = ((sd > 0) & mean.isfinite()).nonzero()[:, 0]
    order = moving[mean[moving].argsort()]
    apart = mean[order].diff() > 2 * torch.maximum(sd[order][1:], sd[order][:-1])
    groups: list[list[int]] = [[]]
    for i, chain in enumerate(order.tolist()):
        if i and bool(apart[i - 1]):
            groups.append([])
        groups[-1].append(chain)
    return groups if 1 < len(groups) <= max(2, len(order) // 2) else None


def _modes(e: Evidence, place: int, groups: list[list[int]]) -> str:
    x, lp = e.draws(place).double(), e.stats.get("lp")
    said: list[str] = []
    heights: list[float] = []
    for chains in groups:
        height = "" if lp is None else f", log density {float(lp[chains].double().mean()):.1f}"
        heights.append(0.0 if lp is None else float(lp[chains].double().mean()))
        said.append(
            f"{_many(len(chains), 'chain')} near {e.name(place)} = {float(x[chains].mean()):.3g}{height}"
        )
    advice = (
        "one lies so much lower that its chains are probably caught in a local mode: start them elsewhere, or warm up longer"
        if max(heights) - min(heights) > 10
        else "how many chains are in a mode says nothing of its probability: use a tempered method, or, if labels are "
        "exchangeable, put them in order"
    )
    return f"They sit in {len(groups)} groups (modes) and do not move between them: {'; '.join(said)}. {advice[0].upper()}{advice[1:]}"


def _few_effective(e: Evidence) -> Iterator[str]:
    bulk, tail = e.every("ess_bulk"), e.every("ess_tail")
    counts = (e.every("sd") > 0) & ~e.disagreeing  # to chains that disagree no number of draws is enough
    least = torch.where(counts, torch.minimum(bulk, tail), torch.inf).nan_to_num(torch.inf)
    worst, low = int(least.argmin()), least < 0.9 * ESS
    if not bool(low.any()):
        return
    which = "Bulk" if bulk[worst] <= tail[worst] else "Tail"
    total = _count(e)
    needed = math.ceil(total * ESS / float(least[worst]))
    step = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    needed = math.ceil(needed / step) * step
    yield (
        f"{which} ESS of {e.name(worst)} is {float(least[worst]):.0f} of {total:,} draws ({_above(low, f'below {ESS}')}): too few for "
        f"{'means' if which == 'Bulk' else 'quantiles'} to be trusted. About {needed:,} draws in all would give {ESS}, "
        f"{math.ceil(needed / e.shape[0]):,} for each chain"
    )


def _energy(e: Evidence) -> Iterator[str]:
    energy, lp = e.stats.get("energy"), e.stats.get("lp")
    if energy is None or e.shape[1] < 10 or (lp is not None and torch.allclose(energy, -lp)):
        return  # without a momentum, energies have nothing to say
    each = e_bfmi(energy)
    together = float(energy.double().diff(dim=-1).square().mean() / energy.double().var())
    low = (each * (1 + 4 / math.sqrt(e.shape[1])) < E_BFMI).nonzero()[:, 0].tolist()
    if together < E_BFMI or low:
        least = min([together, *(float(each[c]) for c in low)])
        whose = f" in {_chains(low, e.shape[0], plain=True)}" if low and len(low) < e.shape[0] else ""
        yield (
            f"E-BFMI is {least:.2f}{whose} (below {E_BFMI}): momenta reach few of the energies that the posterior has, as "
            "with heavy tails or funnels; the tails are explored slowly. Reparameterise, or run longer and look at the tails' ESS"
        )


def _one_chain(e: Evidence) -> Iterator[str]:
    if e.shape[0] == 1:
        yield (
            "one chain only: R-hat compares its halves, and nothing shows whether it missed a part of the posterior. Run at "
            "least 4"
        )


_FOR_ALL: tuple[Callable[[Evidence], Iterator[str]], ...] = (_not_finite, _weights, _constant)
_FOR_CHAINS = (
    _not_finite,
    _stuck,
    _diverged,
    _disagree,
    _few_effective,
    _energy,
    _saturated,
    _one_chain,
    _constant,
    _weights,
)


# --- words ---


def _count(e: Evidence) -> int:
    return e.shape[0] * e.shape[1]


def _threshold(alarm: float) -> float:
    return -float(torch.special.ndtri(torch.tensor(alarm, dtype=torch.float64)))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _above(flags: Tensor, what: str) -> str:
    return f"{int(flags.sum()):,} of {len(flags):,} coordinates are {what}" if len(flags) > 1 else what


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _chains(which: list[int], of: int, plain: bool = False) -> str:
    """Chains by number, as the subject of a sentence."""
    if len(which) == of > 1:
        return "all chains" if plain else f"all {of:,} chains"
    if len(which) > 6:
        return f"{len(which):,} of {of:,} chains ({', '.join(map(str, which[:5]))}, ...)"
    numbers = " and ".join(
        [", ".join(map(str, which[:-1])), str(which[-1])] if len(which) > 1 else [str(which[0])]
    )
    return f"{'chain' if len(which) == 1 else 'chains'} {numbers}"
