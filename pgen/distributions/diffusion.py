"""A law given by what is left of its values under noise: a diffusion, as a distribution for a `pyro.sample` site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.algorithms.diffusion.field import score_of
from pgen.algorithms.diffusion.guidance import classifier_free
from pgen.algorithms.diffusion.schedules import Schedule
from pgen.algorithms.diffusion.solvers import Solver
from pgen.capability import Capability
from pgen.distributions.denoising import Bounded, Flowing, Reversed
from pgen.distributions.editing import decode, edited, encode
from pgen.distributions.rows import expand_context
from pgen.errors import OptionError, ProgramError
from pgen.handlers import Lent


class Diffusion(TorchDistribution):
    r"""The law that a denoiser defines: start from noise, and remove it.

    A denoiser gives the mean of what was there before noise of level :math:`\sigma` was added,

    .. math::
        D(x, \sigma) = \mathbb{E}[x_0 \mid x_0 + \sigma \varepsilon = x], \qquad \varepsilon \sim N(0, I),

    and with it the score of the noisy law, :math:`\nabla \log p_\sigma(x) = (D(x, \sigma) - x) / \sigma^2`. What the
    distribution *is* follows from that: the law at the schedule's least noise level of the probability flow
    :math:`dx / d\sigma = (x - D(x, \sigma)) / \sigma` from pure noise.

    By itself it can denoise, and nothing else exactly: `sample`, `log_prob` and `bound` are there for use by hand, with
    the defaults of the conversions (`reverse-diffusion`, `probability-flow`, `denoising-bound`) by which pgen gives
    them to programs, each with how exact it is.

    Args:
        denoiser: from values `[rows, *event_shape]` and noise levels `[rows]` (and, where there is a context, that,
            `[rows, c]`) to denoised values `[rows, *event_shape]`. See `pgen.nn` for networks, and
            `pgen.algorithms.diffusion.predictions` for networks that predict noise, velocity or score.
        schedule: noise levels: `VE`, `VP`, `SubVP`, `EDM`, `RectifiedFlow`, or your own `Schedule`.
        event_shape: shape of one value; any.
        context: what the law is conditioned on, shape `[*batch_shape, c]`, or None. NaN in a row means no condition.
        validate_args: whether values are checked against the support; None for torch's default.

    Raises:
        OptionError: the schedule is none, or the denoiser cannot be called.
        ProgramError: the denoiser gives values of another shape.

    References:
        Sohl-Dickstein et al., *Deep Unsupervised Learning using Nonequilibrium Thermodynamics*, 2015.
        Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, 2020.
        Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*, 2021.
        Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022.

    Example:
        >>> from pgen.distributions import VE, MixtureDenoiser
        >>> two = MixtureDenoiser(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), scale=0.5)
        >>> law = Diffusion(two, VE(0.01, 80.0), event_shape=(2,))
        >>> _ = torch.manual_seed(0)
        >>> x = law.sample((500,))
        >>> x.shape, bool((x[:, 0].abs().mean() - 2.0).abs() < 0.1)
        (torch.Size([500, 2]), True)
    """

    capabilities = frozenset({Capability.DENOISER})
    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = False

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: Schedule,
        event_shape: tuple[int, ...] | Size | int = (),
        *,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not callable(denoiser):
            raise OptionError(
                f"Diffusion: denoiser is {type(denoiser).__name__}; expected a module or function "
                "denoiser(x, sigma) -> E[x0 | x0 + sigma eps = x]"
            )
        if isinstance(schedule, type) or not isinstance(schedule, Schedule):
            given = schedule.__name__ + " itself" if isinstance(schedule, type) else type(schedule).__name__
            raise OptionError(
                f"Diffusion: schedule is {given}; expected a schedule, as in Diffusion(denoiser, VP(), (2,))"
            )
        sizes = (event_shape,) if isinstance(event_shape, int) else event_shape
        if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise OptionError(
                f"Diffusion: event_shape is {event_shape!r}; expected the shape of one value, such as (2,), (1, 8, 8) or ()"
            )
        event_shape = Size(sizes)
        self.denoiser = denoiser
        self.schedule = schedule
        self.context = context
        super().__init__(
            Size() if context is None else context.shape[:-1], event_shape, validate_args=validate_args
        )

    @property
    def support(self) -> constraints.Constraint:
        """All reals, shaped as a value."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Diffusion:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Diffusion, _instance)
        new.denoiser, new.schedule = self.denoiser, self.schedule
        new.context = expand_context(self.context, Size(batch_shape))
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def conditioned(self, context: Tensor | None) -> Diffusion:
        """The same law under another context, `[*batch_shape, c]`."""
        return Diffusion(self.denoiser, self.schedule, self.event_shape, context=context, validate_args=False)

    def __repr__(self) -> str:
        """Schedule and shapes."""
        batch = "" if not self.batch_shape else f", batch_shape={tuple(self.batch_shape)}"
        return f"Diffusion({self.schedule!r}, event_shape={tuple(self.event_shape)}{batch})"

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Diffusion:
        """The same law, whose denoiser is called in a context: where its tensors are lent to it."""
        new = self.expand(self.batch_shape)
        new.denoiser = Lent(self.denoiser, context)
        return new

    @property
    def unplaced(self) -> Diffusion | None:
        """The law of a single value, where all of the batch have the same: rows can then be denoised in any order."""
        if self.context is not None:
            return None
        return Diffusion(self.denoiser, self.schedule, self.event_shape, validate_args=False)

    def guided(self, scale: float) -> Diffusion:
        """The law with its condition counted `scale` times: classifier-free guidance, see `algorithms.diffusion.guidance`."""
        new = self.expand(self.batch_shape)
        new.denoiser = classifier_free(self.denoiser, scale)
        return new

    def denoise(self, value: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma eps = value].

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.
            sigma: noise level, a number or of a shape that broadcasts with `[..., *batch_shape]`.

        Returns:
            The shape of `value`.
        """
        event = len(self.event_shape)
        level = torch.as_tensor(sigma, dtype=value.dtype, device=value.device)
        lead = Size(np.broadcast_shapes(value.shape[: value.dim() - event], self.batch_shape, level.shape))
        rows = value.expand(lead + self.event_shape).reshape(-1, *self.event_shape)
        return self.rows(lead)(rows, level.expand(lead).reshape(-1)).reshape(lead + self.event_shape)

    def rows(self, lead: Size) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser over flat rows, `[rows, *event_shape]` and `[rows]`, of values of shape `[*lead, *event_shape]`."""
        wide: tuple[Tensor, ...] = ()
        if self.context is not None:
            wide = (self.context.expand(*lead, self.context.shape[-1]).reshape(-1, self.context.shape[-1]),)

        def denoiser(rows: Tensor, sigma: Tensor) -> Tensor:
            found = self.denoiser(rows, sigma, *wide)
            if not isinstance(found, Tensor) or found.shape != rows.shape:
                given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ProgramError(
                    f"the denoiser of a Diffusion gave {given} for values {tuple(rows.shape)} and noise levels "
                    f"{tuple(sigma.shape)}; expected the shape of the values: noise levels are one for each row, "
                    "sigma.reshape(-1, *[1] * (x.dim() - 1)) multiplies rows"
                )
            return found.to(rows.dtype)

        return denoiser

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that values have: those of the context, or of the denoiser."""
        if self.context is not None:
            return self.context.new_empty(0)
        held = itertools.chain.from_iterable(
            getattr(self.denoiser, name, tuple)() for name in ("parameters", "buffers")
        )
        first = next((t for t in held if t.is_floating_point()), None)
        if first is None:
            first = next((v for v in vars_of(self.denoiser) if v.is_floating_point()), None)
        return torch.empty(0) if first is None else first.new_empty(0)

    def score(self, value: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """Gradient of the log density at a noise level (None: the least one), shape of `value`; Tweedie's formula."""
        level = self.schedule.sigma_min if sigma is None else sigma
        wide = torch.as_tensor(level, dtype=value.dtype, device=value.device)
        wide = wide.reshape(wide.shape + (1,) * len(self.event_shape))
        return score_of(self.denoise(value, level), value, wide if wide.dim() else float(level))

    def encode(self, value: Tensor, *, tolerance: float = 1e-5) -> Tensor:
        """The noise at which the path of a value begins: the probability flow upwards, to the largest noise level.

        Without chance: `decode(encode(x))` is x, up to the solver's error. Of a law learned without fault, the noise of
        its draws is standard normal.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`, at the least noise level.
            tolerance: of the solver, relative, and absolute for values of the order of 1.

        Returns:
            The shape of `value`, with no gradient.

        References:
            Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*, 2021, section 4.3.
            Su, Song, Meng and Ermon, *Dual Diffusion Implicit Bridges for Image-to-Image Translation*, 2023: what one
            model encodes, another decodes.

        Example:
            >>> from pgen.distributions import VE, MixtureDenoiser
            >>> narrow = Diffusion(MixtureDenoiser(torch.tensor([[0.0]]), scale=1.0), VE(0.01, 999.0), (1,))
            >>> wide = Diffusion(MixtureDenoiser(torch.tensor([[5.0]]), scale=3.0), VE(0.01, 999.0), (1,))
            >>> wide.decode(narrow.encode(torch.tensor([1.0]))).round(decimals=1)  # one deviation above the mean
            tensor([8.])
        """
        return encode(self, value, tolerance)

    def decode(self, noise: Tensor, *, tolerance: float = 1e-5) -> Tensor:
        """The value at which the path from some noise ends, at the least noise level: the inverse of `encode`.

        Args:
            noise: shape `[..., *batch_shape, *event_shape]`, of scale one: standard normal noise gives draws.
            tolerance: of the solver.

        Returns:
            The shape of `noise`, with no gradient.
        """
        return decode(self, noise, tolerance)

    def edited(
        self,
        value: Tensor,
        sigma: float,
        *,
        steps: int = 32,
        solver: Solver | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draws near a value: noise is added to it, and taken away by this law. A sketch becomes a picture.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.
            sigma: the noise level: the more, the more probable the result is, and the less like the value.
            steps: from there to the least noise level, and on to data.
            solver: takes them; None for the one that draws take.
            seed: of the noise; each draw then depends on its number alone. None: from torch's global generator.

        Returns:
            The shape of `value`, with no gradient.

        Raises:
            DataError: the value has another shape.
            OptionError: sigma is no noise level of the schedule, or there are no steps.

        References:
            Meng et al., *SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations*, 2022.
        """
        return edited(self, value, sigma, Reversed().solver if solver is None else solver, steps, seed)

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws, by the defaults of `reverse-diffusion`: `[*sample_shape, *batch_shape, *event_shape]`."""
        return Reversed().draw(self, Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Estimate of the log density in nats, by the defaults of `probability-flow`: `[..., *batch_shape]`."""
        if self._validate_args and value.numel():
            self._validate_sample(value)
        return Flowing().log_prob(self, value).value

    def bound(self, value: Tensor) -> Tensor:
        """Stochastic lower bound on the log density in nats, by those of `denoising-bound`: `[..., *batch_shape]`."""
        if self._validate_args and value.numel():
            self._validate_sample(value)
        return Bounded().bound(self, value)


def vars_of(thing: object) -> list[Tensor]:
    """Tensors that an object holds as attributes."""
    return [v for v in getattr(thing, "__dict__", {}).values() if isinstance(v, Tensor)]
