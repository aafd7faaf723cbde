"""A law that is known up to its normalising constant: an energy, or an energy that tilts another law."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.algorithms.energy.space import Space
from pgen.capability import Capability, capabilities_of
from pgen.distributions.rows import call_on_rows, expand_context
from pgen.errors import DataError, Intractable, OptionError, ProgramError
from pgen.handlers import Lent

_LISTED = 2**12  # values of a finite support that are listed


class Energy(TorchDistribution):
    r"""The law of an energy, or of an energy that tilts another law.

    .. math:: p(x) = \frac{b(x)\, e^{-E(x)}}{Z}, \qquad Z = \int b(x)\, e^{-E(x)}\, dx

    for an energy E and a base b, which is flat where none is given. Only the density up to Z is known
    (`log_density`); draws, a log probability, and what learning needs are reached by conversions: chains,
    annealed importance sampling, contrastive divergence and others. Where Z can be had (few values, one or two
    dimensions, an energy that knows it), it is.

    With a base, E is an exponential tilt of another law: of a Gaussian, which keeps the integral finite, of a
    flow, of what another fit has learned (`fitted.law("x")`).

    Args:
        energy: a callable from values `[rows, *event_shape]` (and a context `[rows, c]`, where one is given) to
            energies `[rows]`, in nats. It may offer more: `log_partition()`, the log of the sum or integral of
            exp(-E), or None where that takes too long (`knows_partition` says so beforehand); `sweep(x)`, a Gibbs sweep over the rows that leaves exp(-E)
            invariant; `tempered(beta)`, the energy at an inverse temperature. `pgen.nn.RBM` offers all three.
        event_shape: shape of one value.
        base: a distribution over such values, with a density; None: a flat one.
        support: where values live: `constraints.real`, `boolean`, `integer_interval(0, K - 1)`, ... or
            `constraints.cat([...], dim=-1, lengths=[...])` of several, for values of shape `(D,)`. None: that of the base,
            or real.
        context: what the energy is conditioned on, shape `[*batch_shape, c]`, or None.
        validate_args: whether `log_density` checks that values lie in the support.

    Raises:
        OptionError: the base has another event shape or no density, or the support is one on which nothing can move.
        ProgramError: (when asked) the energy gives values of a wrong shape.
        Intractable: `log_prob` was asked for, and nobody knows Z; it is a `NotImplementedError` too.

    Example:
        >>> law = Energy(lambda x: x.square().sum(-1) / 2, (2,))
        >>> law.log_density(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor([-0., -1.])

    References:
        LeCun, Chopra, Hadsell, Ranzato and Huang, A Tutorial on Energy-Based Learning (2006).
    """

    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]

    def __init__(
        self,
        energy: Callable[..., Tensor],
        event_shape: tuple[int, ...] | Size,
        base: Any = None,
        support: constraints.Constraint | None = None,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.energy, self.context = energy, context
        event_shape = Size(event_shape)
        if base is not None:
            _require_base(base, event_shape)
        self.base = None if base is None else _unchecked(base)  # values are checked here, if at all
        self._support = support if support is not None else constraints.real if base is None else base.support
        try:
            self.space = Space.of(self._support, event_shape)
        except ValueError as error:
            raise OptionError(f"Energy(event_shape={tuple(event_shape)}): {error}") from error
        lead = [
            Size() if context is None else context.shape[:-1],
            Size() if base is None else base.batch_shape,
        ]
        batch_shape = torch.broadcast_shapes(*lead)
        #: Where its numbers are in the flattened event of the law that it was made from by `given`; None for one written so.
        self.places: Tensor | None = None
        #: Whether there are several laws, each with a constant of its own.
        self.conditional = bool(batch_shape)
        self._written: Any = self  # before any expansion
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """A density up to a constant, and what follows from few values, or from what the energy offers."""
        found = {Capability.LOG_DENSITY}
        if 0 < self.space.states <= _LISTED:
            found.add(Capability.ENUMERATE)
        if self._knows_partition():
            found.add(Capability.LOG_PROB)
            if callable(getattr(self.energy, "sample", None)):
                found.add(Capability.SAMPLE)
        return frozenset(found)

    @property
    def support(self) -> constraints.Constraint:
        """As declared; that of the base, or real, by default."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the support is a list of at most 4,096 values."""
        return 0 < self.space.states <= _LISTED

    @property
    def single(self) -> Energy:
        """The law of one value, of empty batch shape, where all values have the same; else the law itself. It checks nothing."""
        twin = self.expand(self.batch_shape) if self.conditional else self._written.expand(Size())
        twin._validate_args = False
        return twin

    def expand(self, batch_shape: Size, _instance: Any = None) -> Energy:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Energy, _instance)
        new.energy, new.base, new._support, new.space = self.energy, self.base, self._support, self.space
        new.conditional, new._written, new.places = self.conditional, self._written, self.places
        new.context = expand_context(self.context, Size(batch_shape))
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Energy:
        """The same law, whose energy is called in a context: where its tensors are lent to it."""
        new = self.expand(self.batch_shape)
        new.energy = Lent(self.energy, context)
        within: Callable[..., Any] | None = getattr(self.base, "within", None)
        new.base = self.base if within is None else within(context)
        new._written = new if self._written is self else self._written.within(context)
        return new

    def log_density(self, value: Tensor) -> Tensor:
        """Log density up to log Z, in nats.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.

        Returns:
            Shape `[..., *batch_shape]`.
        """
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[: value.ndim - len(self.event_shape)], self.batch_shape)
        wide = value.expand(lead + self.event_shape)
        dtype = torch.get_default_dtype() if not value.is_floating_point() else value.dtype
        energy = call_on_rows(self.energy, wide.to(dtype), self.event_shape, self.batch_shape, self.context)
        if energy.shape != lead:
            raise ProgramError(
                f"the energy gives shape {tuple(energy.shape[len(lead) :])} for each value of shape {tuple(self.event_shape)}; "
                "expected a single number: net(x).squeeze(-1), or a sum over the last dimensions"
            )
        return -energy if self.base is None else self.base.log_prob(value) - energy

    def log_partition(self) -> Tensor | None:
        """log Z, shape `[]`, where the energy knows it and tilts nothing; else None."""
        known: Callable[[], Tensor | None] | None = getattr(self.energy, "log_partition", None)
        return None if known is None or self.base is not None or self.context is not None else known()

    def _knows_partition(self) -> bool:
        """Whether `log_partition` would answer, without asking it to where it says so itself."""
        said: bool | None = getattr(self.energy, "knows_partition", None)
        if said is None:
            return self.log_partition() is not None
        return said and self.base is None and self.context is None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability, where the energy knows its own log Z.

        Raises:
            Intractable: it does not.
        """
        normaliser = self.log_partition()
        if normaliser is None:
            raise Intractable(
                f"Energy{tuple(self.event_shape)} has no log_prob: its normalising constant is not known. log_density(x) is log p(x) "
                "up to that constant; pgen.fit(program, data, ...).log_prob(data) estimates it, and says how well"
            )
        return self.log_density(value) - normaliser

    def given(self, value: Tensor) -> Energy:
        """The law of what is missing in a value, given the rest: an energy over the missing numbers alone.

        Args:
            value: shape `[*batch, *event_shape]`; NaN where it is missing, in the same places in all rows.

        Returns:
            Of event shape `(missing,)`, in the order of the flattened event, and batch shape `[*batch]`.

        Raises:
            DataError: nothing or everything is missing, or not the same in all rows.
            OptionError: the numbers of the support cannot be taken apart (a simplex), or the law has a context.

        Example:
            >>> law = Energy(lambda x: (x[..., 0] - x[..., 1]).square(), (2,))
            >>> rest = law.given(torch.tensor([3.0, torch.nan]))
            >>> rest.log_density(torch.tensor([[3.0], [5.0]]))
            tensor([-0., -4.])
        """
        if self.conditional or any(part.constraint.event_dim for part in self.space.parts):
            raise OptionError(
                f"Energy{tuple(self.event_shape)}.given: expected one law, whose numbers can be missing one by one; this one is "
                f"{'conditional' if self.conditional else f'on {self._support}'}"
            )
        size = self.event_shape.numel()
        lead = value.shape[: value.ndim - len(self.event_shape)]
        flat = value.reshape(-1, size)
        missing = flat[0].isnan()
        if not bool((flat.isnan() == missing).all()) or bool(missing.all()) or not bool(missing.any()):
            raise DataError(
                f"Energy{tuple(self.event_shape)}.given: expected values with NaN in the same places of all rows, some and not "
                f"all; got {int(flat.isnan().sum())} of {flat.numel()}"
            )
        single, (there,), (gone,) = (
            self.single,
            (~missing).nonzero(as_tuple=True),
            missing.nonzero(as_tuple=True),
        )
        place = torch.cat([there, gone]).argsort()

        def energy(rest: Tensor, seen: Tensor) -> Tensor:
            return -single.log_density(torch.cat([seen, rest], -1)[..., place].reshape(-1, *self.event_shape))

        pieces = [(p.constraint, int(missing[p.start : p.start + p.size].sum())) for p in self.space.parts]
        held = [(constraint, count) for constraint, count in pieces if count]
        support = (
            held[0][0]
            if len(held) == 1
            else constraints.cat(
                [constraint for constraint, _ in held], dim=-1, lengths=[count for _, count in held]
            )
        )
        seen = flat[:, there].reshape(*lead, len(there))
        rest = Energy(energy, (len(gone),), support=support, context=seen)
        rest.places = gone
        return rest

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Exact draws, where the energy has them, `[*sample_shape, *batch_shape, *event_shape]`.

        Raises:
            Intractable: it has not.
        """
        if Capability.SAMPLE not in self.capabilities:
            raise Intractable(
                f"Energy{tuple(self.event_shape)} has no exact draws; pgen.fit(program, None, 'exact').sample(n) draws by chains, "
                "'mcmc' by any of its kernels"
            )
        shape = Size(sample_shape) + self.batch_shape
        energy: Any = self.energy
        return energy.sample(shape.numel()).reshape(shape + self.event_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values, `[K, *batch_shape, *event_shape]`, or `[K, 1, ..., *event_shape]`.

        Raises:
            NotImplementedError: they are measured, or more than 4,096.
        """
        if not self.has_enumerate_support:
            raise NotImplementedError(f"Energy{tuple(self.event_shape)}: its values cannot be listed")
        tensor = next((t for t in (self.context, *_tensors_of(self.energy)) if t is not None), torch.empty(0))
        values = self.space.every(tensor.new_empty(0, dtype=torch.get_default_dtype()))
        values = values.reshape(len(values), *(1,) * len(self.batch_shape), *self.event_shape)
        return values.expand(len(values), *self.batch_shape, *self.event_shape) if expand else values


def _tensors_of(energy: Any) -> list[Tensor]:
    held = getattr(energy, "parameters", None)
    return list(held()) if callable(held) else []


def _unchecked(law: Any) -> Any:
    """A law, and those that it is made of, that take any value: a check would look at every value of every chain."""
    if not isinstance(law, torch.distributions.Distribution):
        return law
    twin: Any = copy.copy(law)
    if "base_dist" in vars(twin):
        twin.base_dist = _unchecked(twin.base_dist)
    twin._validate_args = False  # last: Pyro hands it on to the law inside
    return twin


def _require_base(base: Any, event_shape: Size) -> None:
    able = capabilities_of(base)
    if Capability.LOG_PROB not in able and Capability.LOG_DENSITY not in able:
        raise OptionError(
            f"Energy(base={type(base).__name__}): expected a law with a log density; this one can only "
            f"{', '.join(sorted(c.value for c in able)) or 'nothing'}"
        )
    if Size(base.event_shape) != event_shape:
        raise OptionError(
            f"Energy(base={type(base).__name__}): its event shape is {tuple(base.event_shape)}, that of the energy "
            f"{tuple(event_shape)}; expected the same, as of dist.Normal(torch.zeros{tuple(event_shape)}, 1.0).to_event("
            f"{len(event_shape)})"
        )
