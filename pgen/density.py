"""The log density of a program's latents given its data, on unconstrained vectors, for many of them at once.

    log π(u) = log p(x, T(u)) + log |det T'(u)|

Each latent site has a slice of u, brought into its support by that support's own bijection, which is made anew in
every run: a support may depend on other latents. Finite latents are summed out. The program is run under `vmap` once
per kind of input, recorded, and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from pgen.algorithms.sum_product import log_partition, sample
from pgen.capability import Capability
from pgen.enumeration import enumerate_sites
from pgen.errors import ProgramError
from pgen.handlers import ScaleRows, Substitute, only_named
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure

_MISSING = "_unobserved"  # how Pyro names the part of a site that `obs_mask` leaves out


@dataclass(frozen=True)
class Slot:
    """The place of one latent in the vector.

    Attributes:
        name: the site.
        shape: of its value.
        free: of the unconstrained value.
        start: its first element in the vector.
    """

    name: str
    shape: torch.Size
    free: torch.Size
    start: int

    @property
    def size(self) -> int:
        """How many elements of the vector it takes."""
        return math.prod(self.free)


@dataclass(frozen=True)
class Density:
    """A program's latents as one vector of real numbers.

    Attributes:
        problem: the program with its data.
        structure: its structure.
        slots: where each continuous latent is in the vector.
        finite: latents that are summed out.
        held: latents whose values are given with every call: other kernels move them.
        apart: whether finite latents have to be tried one by one.
        dtype: of the program's numbers.
    """

    problem: Problem
    structure: Structure
    slots: tuple[Slot, ...]
    finite: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    apart: bool = False
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)

    @staticmethod
    def of(
        problem: Problem, structure: Structure, finite: Sequence[str] = (), held: Sequence[str] = ()
    ) -> Density:
        """Lay out the latents of a problem.

        Raises:
            ProgramError: a latent's support has no bijection from the real numbers.
            Refused: finite latents cannot be summed out; the refusal names the site.
        """
        with validating(False), torch.no_grad():
            nodes: Any = poutine.trace(problem).get_trace().nodes
        slots: list[Slot] = []
        start = 0
        for name in structure.latents:
            if name in finite or name in held:
                continue
            node = nodes[name]
            shape = torch.Size(node["value"].shape)
            free = torch.Size(_bijection(name, node["fn"]).inverse_shape(shape))
            slots.append(Slot(name, shape, free, start))
            start += math.prod(free)
        values = {s.name: nodes[s.name]["value"] for s in slots}
        found = Density(problem, structure, tuple(slots), tuple(finite), tuple(held))
        if finite:
            with validating(False), torch.no_grad():
                run = _substituting(problem, values)
                checked = enumerate_sites(run, structure, finite, check=True)
            found = replace(found, apart=checked.apart)
        return found

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(slot.size for slot in self.slots)

    # --- one vector ---------------------------------------------------------------------------------------

    def log_density(
        self, position: Tensor, problem: Problem | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Log density of one unconstrained vector `[d]`, up to a constant: a scalar.

        Args:
            position: the vector.
            problem: the program with other data; None: its own.
            given: values of the latents in `held`.
        """
        problem = self.problem if problem is None else problem
        with _Tolerant():
            return self._log_density(position, problem, given)

    def _log_density(self, position: Tensor, problem: Problem, given: Mapping[str, Tensor] | None) -> Tensor:
        parts = self._parts(position)
        free = _Free(parts, given or {}, weigh=not self.finite)
        if not self.finite:
            with free:
                problem()
            return free.total + free.volume

        def run() -> None:
            with _Free(parts, given or {}, weigh=False) as inner:
                problem()
            free.volume = inner.volume

        # The reader is outermost: it gives the finite latents their values before `_Free` would.
        found = enumerate_sites(run, self.structure, self.finite, apart=self.apart)
        return log_partition(found.graph()).sum() + free.volume

    def _parts(self, position: Tensor) -> dict[str, Tensor]:
        pieces = position.split([slot.size for slot in self.slots], -1) if self.slots else ()
        return {s.name: piece.reshape(s.free) for s, piece in zip(self.slots, pieces, strict=True)}

    # --- many at once -------------------------------------------------------------------------------------

    def value_and_gradient(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `[C]` and its gradient `[C, d]` at vectors `[C, d]`, through vmap."""
        u = positions.detach().requires_grad_()
        with validating(False), torch.enable_grad():
            value = torch.vmap(self.log_density)(u)
            gradient = _slope(value.sum(), u)
        return value.detach(), gradient

    def on_a_batch(self, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """An unbiased estimate of the same, from `size` rows drawn anew at every call, one batch for all vectors."""
        rows = self.problem.rows or 1
        batch = self.problem.take(torch.randint(rows, (size,), device=positions.device))
        u = positions.detach().requires_grad_()
        with validating(False), torch.enable_grad(), ScaleRows(self.structure.data_plates, batch.scale):
            value = torch.vmap(partial(self.log_density, problem=batch))(u)
            gradient = _slope(value.sum(), u)
        return value.detach(), gradient

    def on_many(self, positions: Tensor, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same for R data sets at once.

        Args:
            positions: `[R * C, d]`, data set by data set.
            data: observations `[R, ...]` by site.
        """
        sets = len(next(iter(data.values())))
        u = positions.detach().requires_grad_()

        def one(group: Tensor, seen: dict[str, Tensor]) -> Tensor:
            problem = replace(self.problem, observations={**self.problem.observations, **seen})
            return torch.vmap(partial(self.log_density, problem=problem))(group)

        with validating(False), torch.enable_grad():
            value = torch.vmap(one)(u.reshape(sets, -1, u.shape[-1]), dict(data)).reshape(-1)
            gradient = _slope(value.sum(), u)
        return value.detach(), gradient

    def given_choices(self, positions: Tensor, choices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same given values `[C, ...]` of the latents in `held`."""
        u = positions.detach().requires_grad_()
        with validating(False), torch.enable_grad():
            value = torch.vmap(self.given_choice)(u, dict(choices))
            gradient = _slope(value.sum(), u)
        return value.detach(), gradient

    def given_choice(self, position: Tensor, choice: Mapping[str, Tensor]) -> Tensor:
        """Log density of one vector given values of the latents in `held`."""
        return self.log_density(position, given=choice)

    def alone(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Log density, a scalar, and its gradient `[d]` at one vector `[d]`."""
        u = position.detach().requires_grad_()
        with validating(False), torch.enable_grad():
            value = self.log_density(u)
            gradient = _slope(value, u)
        return value.detach(), gradient

    def one_by_one(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `value_and_gradient` by a loop, for programs that vmap cannot run."""
        return stacked(self.alone, positions)

    def values(self, positions: Tensor) -> dict[str, Tensor]:
        """Values of the continuous latents, and of deterministic sites, `[n, *shape]` at vectors `[n, d]`."""
        with validating(False), torch.no_grad():
            return torch.vmap(self.value)(positions)

    def value(self, position: Tensor, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The same at one vector `[d]`, given values of the latents in `held`."""
        free = _Free(self._parts(position), given or {}, weigh=False)
        with validating(False), torch.no_grad(), _Tolerant(), free:
            self.problem()
        return free.values

    def choices(self, positions: Tensor, data: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Draws of the finite latents given the others, `[n, *shape]`, at vectors `[n, d]`: exact, one for each.

        Args:
            positions: the vectors.
            data: observations by site, `[n, ...]`: a data set for each; None: the problem's own.
        """
        with validating(False), torch.no_grad():
            return torch.vmap(self.choice, randomness="different")(positions, dict(data or {}))

    def choice(self, position: Tensor, data: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The same at one vector `[d]`."""
        problem = replace(self.problem, observations={**self.problem.observations, **(data or {})})

        def run() -> None:
            with _Free(self._parts(position), {}, weigh=False):
                problem()

        with validating(False), torch.no_grad():
            found = enumerate_sites(run, self.structure, self.finite, apart=self.apart)
            indices = sample(found.graph(), 1, check=False)
        return {name: found.values(name, index)[0] for name, index in indices.items()}

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors `[n, d]` of values of the continuous latents `[n, *shape]` (their inverse)."""

        def one(some: dict[str, Tensor]) -> Tensor:
            inverse = _Inverse(some)
            with inverse:
                self.problem()
            pieces = [inverse.found[s.name].reshape(-1) for s in self.slots]
            return torch.cat(pieces)

        laid = {s.name: values[s.name] for s in self.slots}
        with validating(False), torch.no_grad():
            try:
                return torch.vmap(one)(laid)
            except RuntimeError:  # a program that vmap cannot run
                rows = len(next(iter(laid.values())))
                return torch.stack([one({k: v[i] for k, v in laid.items()}) for i in range(rows)])


def _slope(value: Tensor, u: Tensor) -> Tensor:
    """The gradient; zero where the value does not depend on the vector."""
    if not value.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(value, u, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _bijection(name: str, fn: Any) -> Any:
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        raise ProgramError(
            f"site {name!r}: its support {fn.support} has no bijection from the real numbers, so no gradient-based "
            "kernel can move it; give the site a law with a continuous support"
        ) from error


class _Tolerant(TorchFunctionMode):
    """Factors what is not positive definite as NaN: the density is no number there, and nothing is raised.

    One chain that proposes such a place must not stop the others.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.linalg.cholesky, torch.cholesky, Tensor.cholesky):
            matrix, upper = args[0], kwargs.get("upper", args[1] if len(args) > 1 else False)
            factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
            return torch.where((failed == 0)[..., None, None], factor, math.nan)
        return func(*args, **kwargs)


class _Free(Messenger):
    """Gives latents their values from unconstrained parts, and adds up log densities and volumes."""

    def __init__(self, parts: Mapping[str, Tensor], given: Mapping[str, Tensor], weigh: bool) -> None:
        super().__init__()
        self.parts, self.given, self.weigh = parts, given, weigh
        self.total: Any = 0.0
        self.volume: Any = 0.0
        self.values: dict[str, Tensor] = {}
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            return
        if name in self.parts:
            transform, free = biject_to(msg["fn"].support), self.parts[name]
            value = transform(free)
            self.volume = self.volume + transform.log_abs_det_jacobian(free, value).sum()
            self.values[name] = value
        elif name in self.given:
            value = self.given[name]
        elif msg["fn"].has_enumerate_support:
            # Summed out, or moved by others: here some value will do.
            value = _first_value(msg["fn"])
        else:
            return
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if only_named(msg):
            self.values[msg["name"]] = msg["value"]
            return
        if not self.weigh or type(fn).__name__ == "_Subsample":
            return
        log = log_prob_of(fn, msg["value"])
        self.total = self.total + scale_and_mask(log, msg["scale"], self._mask(msg)).sum()

    def _mask(self, msg: Any) -> Any:
        """The mask of a site; none for the missing part of a value that was observed through `obs_mask`.

        Pyro draws that part at all elements and masks it where data are, which leaves these elements without a law: they
        would drift off. Given the law of the site they integrate to one, and nothing looks at them.
        """
        name, mask = msg["name"], msg["mask"]
        self.met.add(name)
        partly = name.endswith(_MISSING) and name.removesuffix(_MISSING) + "_observed" in self.met
        return None if partly and name in self.parts else mask


def log_prob_of(fn: Any, value: Tensor) -> Tensor:
    """The log probability of a value, written so that it batches and that its gradient costs little.

    torch masks the logits of a multinomial by index, which vmap cannot do; and its Bernoulli, under vmap, comes apart
    into thirty operations where `x l - softplus(l)` is three.
    """
    if isinstance(fn, torch.distributions.Independent):
        log = log_prob_of(fn.base_dist, value)
        return log.sum(list(range(-fn.reinterpreted_batch_ndims, 0))) if fn.reinterpreted_batch_ndims else log
    if isinstance(fn, torch.distributions.Multinomial):
        counts = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
        return counts + torch.where(value == 0, 0.0, value * fn.logits).sum(-1)
    if isinstance(fn, torch.distributions.Bernoulli) and "logits" in fn.__dict__:
        return value * fn.logits - torch.nn.functional.softplus(fn.logits)
    declared = getattr(fn, "capabilities", None)
    if declared is not None and Capability.LOG_PROB not in declared:
        return fn.log_density(value)
    return fn.log_prob(value)


def _first_value(fn: Any) -> Tensor:
    """The first value of a finite support, in the shape of a draw."""
    value = fn.enumerate_support(expand=False)[0]
    return value.expand(fn.batch_shape + fn.event_shape) if not fn.event_shape else value


class _Inverse(Messenger):
    """Sets latents to given values, and finds their unconstrained counterparts."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values and not msg["is_observed"]:
            value = self.values[name]
            self.found[name] = biject_to(msg["fn"].support).inv(value)
        elif msg["fn"].has_enumerate_support and not msg["is_observed"]:
            value = _first_value(msg["fn"])
        else:
            return
        msg["value"], msg["done"] = value, True


def _substituting(problem: Problem, values: Mapping[str, Tensor]) -> Callable[[], object]:
    def run() -> None:
        with Substitute(values):
            problem()

    return run


def stacked(alone: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[C]` and gradients `[C, d]`, from a function of one vector."""
    found = [alone(position) for position in positions]
    return torch.stack([value for value, _ in found]), torch.stack([gradient for _, gradient in found])
