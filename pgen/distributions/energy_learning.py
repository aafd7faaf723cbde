r"""Conversions by which a density known up to a constant is learned, one for each objective of `pgen.algorithms.energy`.

    log p(x) = f(x) - log Z          neither log Z nor its gradient can be computed

The law at a site gets a `log_prob` that is a surrogate: its value means little, the gradient of its sum is that of the
likelihood, or of another objective that the true density maximises. So any backend that climbs a likelihood learns an
energy: `pgen.backend("exact", via={"x": "noise-contrastive"})`, or with hyperparameters,
`via={"x": learned_by(NoiseContrastive(ratio=10))}`.

At a latent site the surrogate has a value too, f(x), and two gradients: by the value x that of f, which is that of log p; by
what is learned that of the objective, for which draws of the guide are data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pgen.algorithms.energy.amortised import Amortised
from pgen.algorithms.energy.contrastive import (
    Chained,
    ContrastiveDivergence,
    PersistentContrastiveDivergence,
    ShortRun,
)
from pgen.algorithms.energy.cooperative import Cooperative
from pgen.algorithms.energy.discrepancy import ConditionalNoiseContrastive, EnergyDiscrepancy
from pgen.algorithms.energy.likelihoods import PseudoLikelihood, RatioMatching
from pgen.algorithms.energy.matching import DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching
from pgen.algorithms.energy.noise_contrastive import NoiseContrastive
from pgen.algorithms.energy.reference import Law, Pool, Reference, closest
from pgen.algorithms.energy.space import Space
from pgen.capability import Capability, Exactness, capabilities_of
from pgen.conversion import Conversion, Converted, unexpanded
from pgen.distributions.energy import Energy
from pgen.errors import OptionError
from pgen.registry import hookimpl

_IMAGINED = 256  # draws that a memory is made from where there are no data
_WAYS = 64  # directions in which it is looked whether a density falls off
_FAR = (1e3, 1e6)
_PASSES, _POOL = 16, 4096  # of networks for one draw, from which on draws are made beforehand, and how many
_WIDER = 1.2  # than the data: a law that chains may leap to
_WIDE, _STUCK = 5.0, 0.05


class Memory(nn.Module):
    """What an objective keeps at one site.

    Attributes:
        inner: the objective's own.
        observed: whether the site is.
        scores: whether what it gives for rows that are not learned from can be compared from step to step.
        told: diagnostics of the last step.
    """

    def __init__(self, inner: nn.Module, observed: bool, scores: bool) -> None:
        super().__init__()
        self.inner, self.observed, self.scores = inner, observed, scores
        self.told: dict[str, Tensor] = {}


def learned_by(objective: Any, *, name: str | None = None, cost: float = 100.0) -> Conversion:
    """The conversion of an objective: from a density up to a constant to a surrogate of its log probability.

    Args:
        objective: with hyperparameters, such as `PersistentContrastiveDivergence(chains=500)`.
        name: what it is asked for by; None: that of its class, in words.
        cost: of one use, relative to others; the cheapest is taken where none is asked for.

    Example:
        >>> learned_by(ContrastiveDivergence(steps=3)).name
        'contrastive-divergence'
    """
    name = name or _in_words(type(objective).__name__)

    def memory(law: Any, data: Tensor | None, site: Any) -> Memory:
        space, single = space_of(law), not conditional(law)
        seen = _imagined(law, space) if data is None else data
        options: dict[str, Any] = {"conditional": not single}
        base = base_of(law)
        if single and base is not None and _drawable(base):
            known = _Base(base)
            if data is None or closest(seen, Reference(seen, space, widen=_WIDER), known) is known:
                options["reference"] = quick(known)
        sweep = sweep_of(law)
        if sweep is not None and isinstance(objective, Chained):
            options["sweep"] = sweep
        scores = data is not None and getattr(objective, "scores", False)
        return Memory(objective.memory(seen, space, **options), data is not None, scores)

    def methods(law: Any) -> Mapping[str, Callable[..., Any]]:
        kept: Any = law.memories.get(name)

        def log_prob(value: Tensor) -> Tensor:
            """The surrogate, `[..., *batch_shape]`."""
            return surrogate(law, value, objective, kept)

        return {"log_prob": log_prob}

    return Conversion(
        name,
        frozenset({Capability.LOG_DENSITY}),
        Capability.LOG_PROB,
        Exactness.SURROGATE,
        cost,
        methods,
        random=True,
        purpose="learning",
        unless=_unless(objective),
        memory=memory,
        doubt=doubt,
    )


def surrogate(law: Any, value: Tensor, objective: Any, memory: Memory) -> Tensor:
    """What stands for the log probability while an energy is learned."""
    event = tuple(law.event_shape)
    lead = torch.broadcast_shapes(value.shape[: value.ndim - len(event)], law.batch_shape)
    x = value.expand(*lead, *event).reshape(-1, *event)
    if not memory.training and not memory.scores:
        return law.log_density(value)
    learned = objective(on_rows(law, lead), x.detach(), memory.inner)
    memory.told = learned.told
    if memory.observed:
        return learned.surrogate.reshape(lead)
    # By the value it is f that counts, whatever what is learned is learned by.
    with torch.enable_grad():
        at = value.detach().requires_grad_(value.is_floating_point())
        there = law.log_density(at)
        slope = torch.autograd.grad(there.sum(), at)[0] if value.requires_grad else None
    total = there.detach() + (learned.surrogate - learned.surrogate.detach()).reshape(lead)
    if slope is None:
        return total
    along = ((value - value.detach()) * slope).reshape(*lead, math.prod(event)).sum(-1)
    return total + along


@torch.no_grad()
def doubt(law: Any, metrics: Mapping[str, Tensor]) -> str | None:
    """What is suspicious about an energy that was learned: it does not fall off far from the data, or its chains are elsewhere.

    Args:
        law: as it was learned.
        metrics: of its site, by step.
    """
    space = space_of(law)
    real = (
        bool(space.dims)
        and not space.cardinalities
        and all(p.constraint is constraints.real for p in space.parts)
    )
    if real and not conditional(law):
        generator = torch.Generator().manual_seed(0)
        like = next((t for t in tensors_of(law) if t.is_floating_point()), torch.empty(0))
        way = torch.randn(_WAYS, space.dims, generator=generator).to(like)
        way = way / way.norm(dim=1, keepdim=True) * space.dims**0.5
        f, none = on_rows(law, torch.Size()), torch.empty(_WAYS, 0, dtype=torch.long, device=way.device)
        near, far = (f(space.together(reach * way, none)).double() for reach in _FAR)
        rising = ~(far < near)
        if bool(rising.any()):
            return (
                f"far from the data its log density does not fall off: from {_FAR[0]:g} to {_FAR[1]:g} times the unit vector it rises in "
                f"{int(rising.sum())} of {_WAYS} random directions, so that it has no finite integral (the energy is unbounded "
                "below). Give Energy(..., base=dist.Normal(...).to_event(1)), or an energy that grows, as pgen.nn.MLPEnergy does"
            )
    last = {
        name: float(values[-max(1, len(values) // 10) :].double().mean()) for name, values in metrics.items()
    }
    if last.get("spread", 1.0) > _WIDE:
        return (
            f"its chains spread {last['spread']:.1f} times as wide as the data: it has mass far from them. Take more steps of "
            "training, a base near the data, or via='persistent-contrastive-divergence'"
        )
    if last.get("accept", 1.0) < _STUCK:
        return (
            f"its chains hardly move (acceptance {last['accept']:.2g}), so that what they say is that of where they began; "
            "a smaller learning rate, or regularisation=0.1 of the objective, keeps the energy smoother"
        )
    return None


def on_rows(law: Any, lead: torch.Size) -> Callable[[Tensor], Tensor]:
    """The log density as a function of rows `[R, *event]`; R is a multiple of those of `lead` where the law is conditional."""
    event = tuple(law.event_shape)
    single = getattr(law, "single", unexpanded(law))
    if not conditional(law):
        return lambda x: single.log_density(x).reshape(len(x))
    if not lead:
        kind = type(_plain(law)).__name__
        raise OptionError(
            f"{kind} has batch shape {tuple(law.batch_shape)} and does not say that its rows are alike, so that it has no single normaliser; "
            f"expected {kind}.conditional = False and {kind}.single, the law of empty batch shape, where they are (a law without an "
            "`expand` of its own is copied by Pyro, and needs neither)"
        )

    def density(x: Tensor) -> Tensor:
        wide = x.reshape(-1, *lead, *event)
        return single.log_density(wide).reshape(len(x))

    return density


def several(law: Any) -> tuple[Callable[[Tensor], Tensor], torch.Size]:
    """The log density on rows `[R, *event]`, and the shape of the laws that it holds: empty where there is one.

    Row i is of the law numbered i mod their number. Copies over plates that are of the same law are one.
    """
    if not conditional(law):
        return on_rows(law, torch.Size()), torch.Size()
    written = _plain(law)
    written = getattr(written, "_written", written)
    return on_rows(written, written.batch_shape), torch.Size(written.batch_shape)


def conditional(law: Any) -> bool:
    """Whether a law is several ones, each with a constant of its own."""
    own: bool | None = getattr(law, "conditional", None)
    return bool(_plain(law).batch_shape) if own is None else own


def _plain(law: Any) -> Any:
    """A law as it was written: not converted, not copied over plates."""
    while isinstance(law, Converted):
        law = law.base
    return unexpanded(law)


def space_of(law: Any) -> Space:
    """The space of its values."""
    own: Space | None = getattr(law, "space", None)
    return Space.of(law.support, law.event_shape) if own is None else own


class _Base(nn.Module):
    """A base as what chains leap to."""

    def __init__(self, law: Any) -> None:
        super().__init__()
        self._law = [law]  # its networks are not ours to learn

    @property
    def passes(self) -> int:
        """Times that networks run for a draw."""
        return getattr(self._law[0], "passes", 1)

    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`."""
        return self._law[0].sample((n,))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities `[n]`."""
        return self._law[0].log_prob(x)


def quick(base: _Base) -> Law:
    """A base that chains can leap to at every step: draws of one that is slow, and fixed, are made beforehand."""
    if base.passes <= _PASSES:
        return base
    with torch.enable_grad():
        fixed = not base.log_prob(base.sample(1)).requires_grad
    return Pool(base, _POOL) if fixed else base


def _drawable(base: Any) -> bool:
    able = capabilities_of(base)
    return (
        Capability.LOG_PROB in able
        and bool(able & {Capability.SAMPLE, Capability.RSAMPLE})
        and not base.batch_shape
    )


def _imagined(law: Any, space: Space) -> Tensor:
    """Values to begin with where there are no data: of the base, or of a standard normal law."""
    base = base_of(law)
    if base is not None and _drawable(base):
        return base.sample((_IMAGINED,)).reshape(-1, *law.event_shape)
    return space.together(*space.uniform(_IMAGINED, torch.empty(0)))


def base_of(law: Any) -> Any:
    """What an energy tilts; None, if it is flat."""
    while isinstance(law, Converted):
        law = law.base
    return law.base if isinstance(law, Energy) else None


def sweep_of(law: Any) -> Callable[[Tensor], Tensor] | None:
    """The Gibbs sweep that an energy knows itself, which is one of its law where it tilts nothing."""
    return getattr(getattr(law, "energy", None), "sweep", None) if base_of(law) is None else None


def start_of(law: Any, lead: torch.Size) -> tuple[Tensor, Any]:
    """Where chains begin, `[C, *event]` for C of `lead`, and a law that they may leap to, if one is known.

    Chains that learning left behind come first, then draws of the base, then standard normal coordinates.
    """
    space, n = space_of(law), lead.numel()
    base = base_of(law)
    law_of_leaps = None
    if base is not None and _drawable(base):
        kept: dict[str, Any] = getattr(law, "found", {})
        law_of_leaps = kept.get("leaps") or quick(_Base(base))
        if isinstance(law_of_leaps, Pool):
            kept["leaps"] = law_of_leaps
    for memory in getattr(law, "memories", {}).values():
        chains: Tensor | None = getattr(getattr(memory, "inner", None), "position", None)
        if chains is not None and len(chains):
            places = getattr(_plain(law), "places", None)
            if places is not None:  # what is missing begins where whole values have it
                chains = chains.flatten(1)[:, places]
            return chains[torch.randint(len(chains), (n,), device=chains.device)], law_of_leaps
    if base is not None and capabilities_of(base) & {Capability.SAMPLE, Capability.RSAMPLE}:
        outer = lead[: len(lead) - len(base.batch_shape)]
        return base.sample(outer).reshape(n, *law.event_shape), law_of_leaps
    like = next((t for t in tensors_of(law) if t.is_floating_point()), torch.empty(0))
    return space.together(*space.uniform(n, like.new_empty(0))), None


def tensors_of(law: Any) -> list[Tensor]:
    """Tensors that an energy holds, to tell its type and device."""
    held = getattr(getattr(law, "energy", None), "parameters", None)
    context: Tensor | None = getattr(law, "context", None)
    return [*([] if context is None else [context]), *(held() if callable(held) else ())]


def unmovable(site: Any, structure: Any) -> str | None:
    """Why chains cannot move at a site, if they cannot."""
    if site.improper:
        return "its density has no finite integral"
    try:
        Space.of(site.support, site.event_shape)
    except ValueError as error:
        return str(error)
    return None


def _unless(objective: Any) -> Callable[[Any, Any], str | None]:
    persistent = isinstance(objective, PersistentContrastiveDivergence)

    def unless(site: Any, structure: Any) -> str | None:
        if persistent and (site.parents or site.inputs) and not site.improper:
            given = (*site.parents, *site.inputs)[0]
            return f"it is another law for every {given}, and chains that stay belong to none of them"
        return unmovable(site, structure)

    return unless


def _in_words(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


OBJECTIVES = (
    learned_by(PersistentContrastiveDivergence(), cost=100.0),
    learned_by(ContrastiveDivergence(), cost=110.0),
    learned_by(ShortRun(), cost=120.0),
    learned_by(NoiseContrastive(), cost=130.0),
    learned_by(ConditionalNoiseContrastive(), cost=135.0),
    learned_by(DenoisingScoreMatching(), cost=140.0),
    learned_by(SlicedScoreMatching(), cost=145.0),
    learned_by(ScoreMatching(), cost=150.0),
    learned_by(EnergyDiscrepancy(), cost=155.0),
    learned_by(PseudoLikelihood(), cost=160.0),
    learned_by(RatioMatching(), cost=165.0),
    learned_by(Amortised(), cost=170.0),
    learned_by(Cooperative(), cost=175.0),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(OBJECTIVES)
