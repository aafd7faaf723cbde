"""Conversions: what a distribution can do gives what it could not; the graph of them, and the cheapest exact path.

A conversion is an edge from the capabilities it needs to the ones it gives. Those here need no training; backends and
plugins add theirs through the hook `pgen_conversions`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import networkx as nx
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pgen.capability import Capability, Exactness, capabilities_of
from pgen.errors import UnknownName
from pgen.registry import hookimpl

Purpose = Literal["learning", "answering", "fallback"]


def _always(site: Any, structure: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Conversion:
    """A way from some capabilities of a distribution to another one.

    Attributes:
        name: how it is asked for: `via={"z": name}`.
        needs: capabilities that the distribution must have.
        gives: the capability that the converted distribution has in addition.
        exactness: how the converted answer relates to the truth.
        cost: relative cost of one use, for choosing between paths of equal exactness.
        methods: from the distribution to the methods that the converted one answers with, by name.
        random: whether asking twice gives two numbers (a stochastic bound), so that a ratio of two means nothing.
        purpose: `"learning"`: its numbers are good for their gradients only, and only while tensors are learned (a
            surrogate); `"answering"`: it takes too long, or has no gradient, for learning; `"fallback"`: where nothing else
            leads there, and a backend says what is then worth less; None: for learning and answering.
        unless: from a site and the structure it is in to the reason why it cannot be used there; None: it can.
        memory: from the law at a site, some of its data (`[n, *event]`, or None) and the site to what learning by it
            keeps: a module, whose parameters are learned with those of the program and whose buffers are its state.
            Methods find it as `law.memories[name]`.
        doubt: from the law as it was learned by it, and the metrics of the site, to what is suspicious; None: nothing is.
    """

    name: str
    needs: frozenset[Capability]
    gives: Capability
    exactness: Exactness
    cost: float
    methods: Callable[[dist.Distribution], Mapping[str, Callable[..., Any]]]
    random: bool = False
    purpose: Purpose | None = None
    unless: Callable[[Any, Any], str | None] = _always
    memory: Callable[[Any, Tensor | None, Any], nn.Module] | None = None
    doubt: Callable[[Any, Mapping[str, Tensor]], str | None] | None = None

    def convert(self, distribution: dist.Distribution) -> dist.Distribution:
        """The distribution with the further capability."""
        return Converted(distribution, (self,))


class Converted(dist.TorchDistribution):
    """A distribution that answers more than it did, through conversions; in all else it is what it was.

    Attributes:
        base: what it was.
        conversions: in the order in which they were applied.
        memories: what conversions keep from one step of learning to the next, by name.
        found: what conversions have computed and need not compute again as long as nothing is learned, by name.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - declared as torch declares it

    def __init__(
        self,
        base: Any,
        conversions: tuple[Conversion, ...],
        memories: Mapping[str, nn.Module] | None = None,
        found: MutableMapping[str, Any] | None = None,
    ) -> None:
        """Apply the conversions in order."""
        self.base, self.conversions = base, conversions
        self.memories = {} if memories is None else memories
        self.found = {} if found is None else found
        self.capabilities = capabilities_of(base) | {c.gives for c in conversions}
        self._methods: dict[str, Callable[..., Any]] = {}
        for conversion in conversions:
            self._methods |= conversion.methods(self)
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def __getattr__(self, name: str) -> Any:
        """Converted methods that a plain distribution does not know (`score`, `log_density`), then those of the base."""
        methods = self.__dict__.get("_methods", {})
        if name in methods:
            return methods[name]
        if "base" not in self.__dict__:
            raise AttributeError(name)
        return getattr(unexpanded(self.base), name)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry pathwise gradients."""
        return self.base.has_rsample

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the support is a finite list."""
        return self.base.has_enumerate_support

    @property
    def support(self) -> Any:
        """The support of the base."""
        return self.base.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log probability, converted if need be."""
        return self._methods.get("log_prob", self.base.log_prob)(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws, converted if need be."""
        return self._methods.get("sample", self.base.sample)(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws with pathwise gradients, converted if need be."""
        return self._methods.get("rsample", self.base.rsample)(sample_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The values of a finite support."""
        return self.base.enumerate_support(expand=expand)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Converted:
        """The same over another batch shape."""
        return Converted(self.base.expand(batch_shape), self.conversions, self.memories, self.found)


class Normaliser(NamedTuple):
    """log Z of a law whose density is known up to a constant, in nats; what is not known is None.

    `[]` each; of a law that is conditional, `[*batch_shape]`.

    Attributes:
        value: log Z.
        stderr: standard error, where it was estimated from random numbers.
        lower: a stochastic lower bound.
        upper: a stochastic upper bound.
        error: how far the rule that integrated it is off, where one did.
        probes: the log density at a few places, to tell whether it has changed since.
    """

    value: Tensor
    stderr: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    error: Tensor | None = None
    probes: Tensor | None = None


def unexpanded(law: Any) -> Any:
    """The law that Pyro has copied over plates, where it has no `expand` of its own."""
    while isinstance(law, dist.ExpandedDistribution):
        law = law.base_dist
    return law


def inside(fn: Any, change: Callable[[Any], Any]) -> Any:
    """A law changed within what Pyro wraps around it: `to_event`, `mask`; where the inner law says what it can do itself."""
    if getattr(fn, "capabilities", None) is None and _declares(fn):
        inner = inside(fn.base_dist, change)
        if isinstance(fn, dist.MaskedDistribution):
            return inner.mask(fn._mask)
        return inner.to_event(fn.reinterpreted_batch_ndims)
    return change(fn)


def _declares(fn: Any) -> bool:
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return getattr(fn, "capabilities", None) is not None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A function from distribution to distribution: a path of conversions, with what these keep and find.

    Attributes:
        path: in order of application.
        memories: see `Converted`.
        found: likewise.
    """

    path: tuple[Conversion, ...]
    memories: Mapping[str, nn.Module] = field(default_factory=dict)
    found: MutableMapping[str, Any] = field(default_factory=dict)

    def __call__(self, law: Any) -> Any:
        """The law, converted."""
        if not self.path:
            return law
        return inside(law, lambda inner: Converted(inner, self.path, self.memories, self.found))

    @property
    def normalisers(self) -> list[Normaliser]:
        """Those that were found on the way."""
        return [value for value in self.found.values() if isinstance(value, Normaliser)]


def as_conversion(way: Any) -> Conversion | str:
    """What `via` names: a conversion by its name, itself, or an object that has one, such as options of a conversion."""
    return way if isinstance(way, (str, Conversion)) else way.conversion


@dataclass(frozen=True)
class Conversions:
    """The installed conversions, as a graph.

    >>> has = frozenset({Capability.LOG_PROB})
    >>> [c.name for c in Conversions().path(has, Capability.SCORE)]
    ['density', 'autograd-score']
    """

    installed: tuple[Conversion, ...] = field(default_factory=lambda: CORE)

    def __iter__(self) -> Iterator[Conversion]:
        """The conversions."""
        return iter(self.installed)

    def named(self, name: Any) -> Conversion:
        """The conversion of that name; a conversion itself is what it is.

        Raises:
            UnknownName: none is installed under it.
        """
        name = as_conversion(name)
        if isinstance(name, Conversion):
            return name
        found = next((c for c in self if c.name == name), None)
        if found is None:
            raise UnknownName(f"no conversion {name!r}; installed: {', '.join(c.name for c in self)}")
        return found

    @property
    def graph(self) -> nx.DiGraph:
        """Capabilities and conversions as a bipartite graph: needed capability -> conversion -> given capability."""
        graph: nx.DiGraph = nx.DiGraph()
        for c in self:
            graph.add_node(c.name, exactness=str(c.exactness), cost=c.cost)
            for need in c.needs:
                graph.add_edge(need, c.name)
            graph.add_edge(c.name, c.gives)
        return graph

    def path(
        self,
        has: frozenset[Capability],
        wanted: Capability,
        via: Any = None,
        *,
        random: bool = True,
        purpose: Purpose = "answering",
        at: tuple[Any, Any] | None = None,
    ) -> tuple[Conversion, ...] | None:
        """The best conversions from what is there to what is wanted: most exact first, then cheapest.

        Knuth's generalisation of Dijkstra's algorithm, as a conversion may need several capabilities at once.

        Args:
            has: capabilities of the distribution.
            wanted: the capability asked for.
            via: a conversion, or its name, that the path must end with or pass through.
            random: whether conversions may answer with random numbers.
            purpose: what it is for.
            at: the site and its structure, where conversions are to be asked whether they can be used there.

        Returns:
            The conversions in order of application, empty if none is needed, None if there is no way.
        """
        if via is not None:
            forced = self.named(via)
            first = [
                self.path(has, need, random=random, purpose=purpose, at=at)
                for need in sorted(forced.needs, key=lambda c: c.value)
            ]
            usable = forced.purpose in (None, purpose) and not (at and forced.unless(*at))
            if any(p is None for p in first) or (forced.random and not random) or not usable:
                return None
            head = tuple(dict.fromkeys(c for p in first if p for c in p))
            gives = has | {c.gives for c in head} | {forced.gives}
            tail = self.path(gives, wanted, random=random, purpose=purpose, at=at)
            return None if tail is None else (*head, forced, *tail)
        if wanted in has:
            return ()
        ticket = itertools.count()
        usable = [
            c
            for c in self
            if c.purpose in (None, purpose) and (random or not c.random) and not (at and c.unless(*at))
        ]
        best: dict[Capability, tuple[Conversion, ...]] = {}
        queue: list[tuple[int, float, int, Capability, tuple[Conversion, ...]]] = [
            (-4, 0.0, next(ticket), c, ()) for c in has
        ]
        heapq.heapify(queue)
        while queue:
            _, _, _, capability, path = heapq.heappop(queue)
            if capability in best:
                continue
            best[capability] = path
            if capability is wanted:
                return path
            for c in usable:
                if capability in c.needs and c.needs <= best.keys() and c.gives not in best:
                    whole = (
                        *dict.fromkeys(
                            s for need in sorted(c.needs, key=lambda n: n.value) for s in best[need]
                        ),
                        c,
                    )
                    heapq.heappush(
                        queue,
                        (
                            -min(s.exactness.strength for s in whole),
                            sum(s.cost for s in whole),
                            next(ticket),
                            c.gives,
                            whole,
                        ),
                    )
        return None


def exactness_of(path: Iterable[Conversion]) -> Exactness:
    """The weakest link of a path; exact if it is empty."""
    return min((c.exactness for c in path), key=lambda e: e.strength, default=Exactness.EXACT)


def _density(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    return {"log_density": distribution.log_prob}


def _score(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    def score(value: Tensor) -> Tensor:
        """Gradient of the log density with respect to the value, shape of the value."""
        with torch.enable_grad():
            x = value if value.requires_grad else value.detach().requires_grad_()
            return torch.autograd.grad(
                distribution.log_density(x).sum(), x, create_graph=value.requires_grad
            )[0]

    return {"score": score}


def _table(distribution: Any) -> Tensor:
    """Log density of every value of the support, shape [K, *batch]; a law that is the same in all rows is asked once."""
    single = getattr(distribution, "single", distribution)
    values = single.enumerate_support(expand=True)
    return single.log_density(values)


def _exact_sum(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    def log_prob(value: Tensor) -> Tensor:
        """Log density less the exact log sum over the support."""
        return distribution.log_density(value) - _table(distribution).logsumexp(0)

    return {"log_prob": log_prob}


def _table_sample(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    def sample(sample_shape: Any = torch.Size()) -> Tensor:
        """Exact draws from the table of probabilities."""
        single = getattr(distribution, "single", None)
        if single is not None and not single.batch_shape:
            return _draws_of_single(single, torch.Size(sample_shape) + distribution.batch_shape)
        values = distribution.enumerate_support(expand=True)
        index = dist.Categorical(logits=distribution.log_prob(values).movedim(0, -1)).sample(
            torch.Size(sample_shape)
        )
        index = index.reshape(index.shape + (1,) * len(distribution.event_shape)).expand(
            index.shape + distribution.event_shape
        )
        flat = values.expand((values.shape[0], *distribution.batch_shape, *distribution.event_shape))
        picked = torch.gather(flat, 0, index.reshape((-1, *flat.shape[1:])))
        return picked.reshape(torch.Size(sample_shape) + distribution.batch_shape + distribution.event_shape)

    return {"sample": sample}


def _draws_of_single(single: Any, shape: torch.Size) -> Tensor:
    """Draws `[*shape, *event]` of a law of empty batch shape from the table of its densities."""
    values = single.enumerate_support(expand=True)
    return values[dist.Categorical(logits=single.log_density(values)).sample(shape)]


def _constant(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    return {"log_prob": getattr(distribution, "log_density", None) or distribution.base.log_prob}


def _constant_varies(site: Any, structure: Any) -> str | None:
    """Why the constant of a density cannot be left out: it depends on something that moves."""
    moving = [f"the learned {name}" for name in site.params]
    moving += [f"the latent {name}" for name in site.parents if name in structure.latents]
    return f"the constant of its density depends on {moving[0]}" if moving else None


def _bound(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    return {"bound": distribution.log_prob}


def _bound_for_log_prob(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    return {"log_prob": distribution.bound}


def _draw(distribution: Any) -> Mapping[str, Callable[..., Any]]:
    return {
        "sample": lambda sample_shape=torch.Size(): distribution.base.rsample(
            torch.Size(sample_shape)
        ).detach()
    }


_C = Capability
CORE = (
    Conversion("density", frozenset({_C.LOG_PROB}), _C.LOG_DENSITY, Exactness.EXACT, 0.0, _density),
    Conversion("bound", frozenset({_C.LOG_PROB}), _C.BOUND, Exactness.EXACT, 0.0, _bound),
    Conversion(
        "bound-for-log-prob",
        frozenset({_C.BOUND}),
        _C.LOG_PROB,
        Exactness.LOWER_BOUND,
        1.0,
        _bound_for_log_prob,
        random=True,
    ),
    Conversion("draw", frozenset({_C.RSAMPLE}), _C.SAMPLE, Exactness.EXACT, 0.0, _draw),
    Conversion("autograd-score", frozenset({_C.LOG_DENSITY}), _C.SCORE, Exactness.EXACT, 1.0, _score),
    Conversion(
        "exact-sum", frozenset({_C.ENUMERATE, _C.LOG_DENSITY}), _C.LOG_PROB, Exactness.EXACT, 2.0, _exact_sum
    ),
    Conversion(
        "constant-left-out",
        frozenset({_C.LOG_DENSITY}),
        _C.LOG_PROB,
        Exactness.EXACT,  # but for a number that nothing depends on
        0.5,
        _constant,
        purpose="learning",
        unless=_constant_varies,
    ),
    Conversion(
        "unnormalised",
        frozenset({_C.LOG_DENSITY}),
        _C.LOG_PROB,
        Exactness.UNNORMALIZED,
        0.0,
        _constant,
        purpose="fallback",
    ),
    Conversion(
        "table", frozenset({_C.ENUMERATE, _C.LOG_PROB}), _C.SAMPLE, Exactness.EXACT, 1.0, _table_sample
    ),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions of the core, provided as any plugin provides its own."""
    return list(CORE)
