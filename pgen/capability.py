"""The vocabulary: what a site's distribution can do, what a fit can answer, and how exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum, StrEnum
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.errors import MeasureError

Measure = Literal["mass", "density", "mixed"]


class Capability(Enum):
    """What the distribution at a site can do, by itself or through conversions."""

    SAMPLE = "sample"  # draw values
    RSAMPLE = "rsample"  # draw values with pathwise gradients
    LOG_PROB = "log_prob"  # normalised log density or log mass
    LOG_DENSITY = "log_density"  # log density up to an additive constant
    BOUND = "bound"  # stochastic lower bound on log_prob
    SCORE = "score"  # gradient of the log density with respect to the value
    DENOISER = "denoiser"  # E[x0 | x0 + sigma noise = x]
    RATIO = "ratio"  # log density ratio to a reference
    ENUMERATE = "enumerate"  # list a finite support

    def __repr__(self) -> str:
        """Print as it is written in a program."""
        return f"Capability.{self.name}"


class Exactness(StrEnum):
    """How a number relates to the truth that it stands for."""

    EXACT = "exact"
    LOWER_BOUND = "lower bound"
    UPPER_BOUND = "upper bound"
    ESTIMATE = "estimate"
    SURROGATE = "surrogate"  # the value means nothing, its gradient is right
    UNNORMALIZED = "unnormalized"

    @property
    def strength(self) -> int:
        """Position on the scale of promises: the higher, the more is promised."""
        return {
            "exact": 4,
            "lower bound": 3,
            "upper bound": 3,
            "estimate": 2,
            "surrogate": 1,
            "unnormalized": 0,
        }[self.value]


class Query(StrEnum):
    """What a fitted program can be asked."""

    SAMPLE = "sample"
    LOG_PROB = "log_prob"
    POSTERIOR = "posterior"
    MARGINALS = "marginals"


class Rank(IntEnum):
    """How well a backend suits a program, in its own judgement."""

    POSSIBLE = 1
    SUITED = 2
    IDEAL = 3


@dataclass(frozen=True)
class Offer:
    """What a backend promises for a program: which queries, how exactly, how well suited and why.

    `paths` names, for each site that needs adapting, the conversions applied to its distribution where queries are answered;
    `learning` those by which it is learned, where these are others.
    """

    answers: Mapping[Query, Exactness]
    rank: Rank
    why: str
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    learning: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """An offer is a yes."""
        return True


@dataclass(frozen=True)
class Refusal:
    """Why a backend cannot serve a program: the site, the property it lacks, and the reason."""

    site: str | None
    missing: str
    why: str

    def __bool__(self) -> bool:
        """A refusal is a no."""
        return False


@dataclass(frozen=True)
class Estimate:
    r"""A log probability per row that says what it is.

    Attributes:
        value: log probability in nats, shape `[n]`.
        kind: how `value` relates to the truth; compares equal to `"exact"`, `"lower bound"`, ...
        stderr: Monte Carlo standard error, shape `[n]`, or None where nothing is random.
        measure: `"mass"` for discrete observations, `"density"` for continuous, `"mixed"` for both.
        dims: number of observed scalars per row, for bits per dimension.
        particles: draws spent per row, where draws were spent.
        khat: Pareto shape of the importance weights per row, where there were weights (trust below 0.7).
        evaluations: network evaluations spent per row, where an equation was solved.
        solver_error: size of the error that its solver made, in nats, shape `[n]`: what two tolerances differ by.
        lower: a stochastic lower bound, shape `[n]`: its expectation is below the truth.
        upper: a stochastic upper bound, likewise.
        shared: the part of `stderr` that all rows have in common, shape `[]`: that of a normaliser, which no number of rows
            averages out.

    >>> e = Estimate(torch.tensor([-64.0, -32.0]), Exactness.EXACT, measure="mass", dims=64)
    >>> e.kind == "exact", round(e.bits_per_dim(), 3)
    (True, 1.082)
    """

    value: Tensor
    kind: Exactness
    stderr: Tensor | None = None
    measure: Measure = "density"
    dims: int | None = None
    particles: int | None = None
    khat: Tensor | None = None
    evaluations: int | None = None
    solver_error: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    shared: Tensor | None = None

    def __post_init__(self) -> None:
        """Accept the kind as a plain word too."""
        object.__setattr__(self, "kind", Exactness(self.kind))

    @property
    def nats(self) -> Tensor:
        """The value, in nats, shape `[n]`."""
        return self.value

    def mean(self) -> Estimate:
        """The mean over rows, with the standard error of the *estimation* (not of the data)."""
        stderr = None
        if self.stderr is not None:
            common = self.value.new_zeros(()) if self.shared is None else self.shared.to(self.value)
            own = (self.stderr.square() - common.square()).clamp(min=0).sum() / max(
                1, self.stderr.numel()
            ) ** 2
            stderr = (own + common.square().reshape(())).sqrt()
        solver = None if self.solver_error is None else self.solver_error.mean()
        ends = {k: v if v is None else v.mean() for k, v in (("lower", self.lower), ("upper", self.upper))}
        return replace(self, value=self.value.mean(), stderr=stderr, khat=None, solver_error=solver, **ends)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the truth lies with this probability, as far as the standard error tells: two ends, shape `[n]` each.

        Raises:
            MeasureError: there is no standard error, and the value is not exact.
        """
        if self.stderr is None:
            if self.kind is not Exactness.EXACT:
                raise MeasureError(
                    f"interval: this {self.kind.value} has no standard error, so that nothing is known of its distance to "
                    "the truth"
                )
            return self.value, self.value
        wide = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) * self.stderr
        return self.value - wide, self.value + wide

    def bits_per_dim(self, cell: float | None = None) -> float:
        r"""Mean code length, $-\overline{\log p} / (D \ln 2)$, in bits per observed scalar.

        Args:
            cell: width of the cell that a continuous value stands for. A density has no code length
                without one: the mass of a cell is its density times `cell ** dims`.

        Raises:
            MeasureError: the value is a density and no cell is given, a mass and a cell is given,
                or it is not known how many scalars a row has.
        """
        if self.dims is None:
            raise MeasureError(
                "bits_per_dim: this estimate does not say how many scalars a row has (dims is None)"
            )
        if (self.measure == "mass") == (cell is not None):
            raise MeasureError(
                f"bits_per_dim: got a {self.measure} and cell={cell}; a mass takes no cell, a density needs the width "
                "of the cell that a value stands for: estimate.bits_per_dim(cell=1/256)"
            )
        nats = float(self.value.mean()) + (0.0 if cell is None else self.dims * math.log(cell))
        return -nats / (self.dims * math.log(2.0))

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference in nats, row by row; refuses to subtract a density from a mass."""
        if not isinstance(other, Estimate):
            return NotImplemented
        if self.measure != other.measure:
            raise MeasureError(
                f"cannot compare a {self.measure} with a {other.measure}: log probabilities of different measures differ "
                "by an arbitrary constant; evaluate both programs on the same data with the same kind of support"
            )
        exact = self.kind == other.kind == Exactness.EXACT
        errors = [e.stderr.square() for e in (self, other) if e.stderr is not None]
        return Estimate(
            self.value - other.value,
            Exactness.EXACT if exact else Exactness.ESTIMATE,
            stderr=torch.stack(errors).sum(0).sqrt() if errors else None,
            measure=self.measure,
            dims=self.dims,
        )

    def __repr__(self) -> str:
        """Say the mean, how exact it is, and of what."""
        error = "" if self.stderr is None else f" ± {float(self.mean().stderr):.3g}"  # type: ignore[arg-type]
        rows = f"{self.value.numel()} rows" if self.value.ndim else "mean"
        spent = "" if self.evaluations is None else f", {self.evaluations} evaluations"
        if self.solver_error is not None:
            spent += f", solver error {float(self.solver_error.mean()):.2g}"
        return f"Estimate({float(self.value.mean()):.4f}{error} nats, {self.kind.value}, log {self.measure}, {rows}{spent})"


_WRAPPERS = (torch.distributions.Independent, torch.distributions.TransformedDistribution)
_BARE = (torch.distributions.Distribution, torch.distributions.ExponentialFamily, dist.Distribution)


def capabilities_of(distribution: dist.Distribution) -> frozenset[Capability]:
    """What a distribution can do by itself: as declared in its `capabilities`, or derived for torch, Pyro and zuko.

    >>> sorted(c.value for c in capabilities_of(dist.Bernoulli(0.5)))
    ['enumerate', 'log_prob', 'sample']
    """
    declared = getattr(distribution, "capabilities", None)
    if declared is not None:
        return frozenset(declared)
    if isinstance(distribution, (dist.ImproperUniform, dist.Unit)):
        return frozenset({Capability.LOG_DENSITY})
    if isinstance(distribution, (dist.ExpandedDistribution, dist.MaskedDistribution)):
        return capabilities_of(distribution.base_dist)
    if isinstance(distribution, _WRAPPERS):
        plain = getattr(distribution, "reinterpreted_batch_ndims", 1) == 0
        return frozenset(
            c for c in capabilities_of(distribution.base_dist) if plain or c is not Capability.ENUMERATE
        )
    found = set()
    if distribution.has_rsample and _overrides(distribution, "rsample"):
        found |= {Capability.SAMPLE, Capability.RSAMPLE}
    if _overrides(distribution, "sample"):
        found.add(Capability.SAMPLE)
    if _overrides(distribution, "log_prob"):
        found.add(Capability.LOG_PROB)
    if distribution.has_enumerate_support:
        found.add(Capability.ENUMERATE)
    return frozenset(found)


def _overrides(distribution: dist.Distribution, method: str) -> bool:
    """Whether a class below the abstract ones defines the method."""
    owner = next((c for c in type(distribution).__mro__ if method in vars(c)), None)
    return owner is not None and owner not in _BARE
