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
from torch import Tensor

from pgen.algorithms.sum_product import log_partition, sample
from pgen.enumeration import enumerate_sites
from pgen.handlers import ScaleRows, Substitute
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure
from pgen.terms import Apart, Relaxed
from pgen.unconstrained import Constrain, Tolerant, Unconstrain, bijection_of


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
            free = torch.Size(bijection_of(name, node["fn"]).inverse_shape(shape))
            slots.append(Slot(name, shape, free, start))
            start += math.prod(free)
        values = {s.name: nodes[s.name]["value"] for s in slots}
        found = Density(problem, structure, tuple(slots), tuple(finite), tuple(held))
        if finite:
            with validating(False), torch.no_grad():
                run = Substitute(values)(problem)
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
        with Tolerant():
            return self._log_density(position, problem, given)

    def _log_density(self, position: Tensor, problem: Problem, given: Mapping[str, Tensor] | None) -> Tensor:
        parts = self._parts(position)
        free = Constrain(parts, given or {}, weigh=not self.finite)
        if not self.finite:
            with free:
                problem()
            return free.total + free.volume

        def run() -> None:
            with Constrain(parts, given or {}, weigh=False) as inner:
                problem()
            free.volume = inner.volume

        # The reader is outermost: it gives the finite latents their values before `Constrain` would.
        found = enumerate_sites(run, self.structure, self.finite, apart=self.apart)
        return log_partition(found.graph()).sum() + free.volume

    def terms(self, position: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms that the log density of one vector is the sum of, by site; see `Apart`.

        Where latents are summed out, all is one term, named "".

        Args:
            position: the vector, `[d]`.
            given: values of the latents in `held`.
        """
        if self.finite:
            return {"": self.log_density(position, given=given)}
        apart = Apart(self._parts(position), given)
        with Tolerant(), apart:
            self.problem()
        return apart.terms

    def relaxed(self, position: Tensor, given: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> Tensor:
        """Log density of one vector, differentiable by one-hot codes of the values of latents in `held`; see `Relaxed`.

        Where no latents are summed out. That the program gives the same at the corners as `log_density` is for the caller to
        check.
        """
        relaxed = Relaxed(self._parts(position), given, codes)
        with Tolerant(), relaxed:
            self.problem()
        return relaxed.total + relaxed.volume

    def _parts(self, position: Tensor) -> dict[str, Tensor]:
        pieces = position.split([slot.size for slot in self.slots], -1) if self.slots else ()
        return {s.name: piece.reshape(s.free) for s, piece in zip(self.slots, pieces, strict=True)}

    # --- many at once -------------------------------------------------------------------------------------

    def value_and_gradient(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `[C]` and its gradient `[C, d]` at vectors `[C, d]`, through vmap."""
        return _and_slope(torch.vmap(self.log_density), positions)

    def on_a_batch(self, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """An unbiased estimate of the same, from `size` rows drawn anew at every call, one batch for all vectors."""
        rows = self.problem.rows or 1
        batch = self.problem.take(torch.randint(rows, (size,), device=positions.device))
        with ScaleRows(self.structure.data_plates, batch.scale):
            return _and_slope(torch.vmap(partial(self.log_density, problem=batch)), positions)

    def on_many(
        self, positions: Tensor, data: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same for R data sets at once.

        Args:
            positions: `[R * C, d]`, data set by data set.
            data: observations `[R, ...]` by site.
            inputs: arguments `[R, ...]` by name, where they are others in each data set.
        """
        inputs = dict(inputs or {})
        sets = len(next(iter((*data.values(), *inputs.values()))))

        def one(group: Tensor, seen: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
            problem = replace(
                self.problem,
                inputs={**self.problem.inputs, **given},
                observations={**self.problem.observations, **seen},
            )
            return torch.vmap(partial(self.log_density, problem=problem))(group)

        def each(u: Tensor) -> Tensor:
            return torch.vmap(one)(u.reshape(sets, len(u) // sets, u.shape[-1]), dict(data), inputs).reshape(
                -1
            )

        return _and_slope(each, positions)

    def given_choices(self, positions: Tensor, choices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same given values `[C, ...]` of the latents in `held`."""
        return _and_slope(lambda u: torch.vmap(self.given_choice)(u, dict(choices)), positions)

    def given_choice(self, position: Tensor, choice: Mapping[str, Tensor]) -> Tensor:
        """Log density of one vector given values of the latents in `held`."""
        return self.log_density(position, given=choice)

    def alone(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Log density, a scalar, and its gradient `[d]` at one vector `[d]`."""
        return _and_slope(self.log_density, position)

    def one_by_one(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `value_and_gradient` by a loop, for programs that vmap cannot run."""
        return stacked(self.alone, positions)

    def values(self, positions: Tensor) -> dict[str, Tensor]:
        """Values of the continuous latents, and of deterministic sites, `[n, *shape]` at vectors `[n, d]`."""
        with validating(False), torch.no_grad():
            return torch.vmap(self.value)(positions)

    def value(self, position: Tensor, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The same at one vector `[d]`, given values of the latents in `held`."""
        free = Constrain(self._parts(position), given or {}, weigh=False)
        with validating(False), torch.no_grad(), Tolerant(), free:
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
            with Constrain(self._parts(position), {}, weigh=False):
                problem()

        with validating(False), torch.no_grad():
            found = enumerate_sites(run, self.structure, self.finite, apart=self.apart)
            indices = sample(found.graph(), 1, check=False)
        return {name: found.values(name, index)[0] for name, index in indices.items()}

    def volume(self, positions: Tensor) -> Tensor:
        """Log determinants `[n]` of coordinates other than the unconstrained latents, at vectors `[n, d]`: zero here."""
        return positions.new_zeros(len(positions))

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors `[n, d]` of values of the continuous latents `[n, *shape]` (their inverse)."""

        def one(some: dict[str, Tensor]) -> Tensor:
            inverse = Unconstrain(some)
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


def _and_slope(log_density: Callable[[Tensor], Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of each in its own vector: zero where it does not depend on that."""
    u = positions.detach().requires_grad_()
    with validating(False), torch.enable_grad():
        value = log_density(u)
        slope = torch.autograd.grad(value.sum(), u, allow_unused=True)[0] if value.requires_grad else None
    return value.detach(), torch.zeros_like(u) if slope is None else slope


def stacked(alone: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[C]` and gradients `[C, d]`, from a function of one vector."""
    found = [alone(position) for position in positions]
    return torch.stack([value for value, _ in found]), torch.stack([gradient for _, gradient in found])
