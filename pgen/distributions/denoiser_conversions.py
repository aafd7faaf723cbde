"""Conversions from a denoiser: to a score, to draws, to a bound, to a log density. One of the plugins of pgen itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from pgen.capability import Capability, Exactness
from pgen.conversion import Conversion
from pgen.distributions.denoising import Bounded, Flowing, Reversed
from pgen.registry import hookimpl

Methods = Mapping[str, Callable[..., Any]]
_DENOISER = frozenset({Capability.DENOISER})


def _tweedie(law: Any) -> Methods:
    def score(value: Tensor) -> Tensor:
        """Gradient of the log density at the least noise level."""
        level = law.schedule.sigma_min
        return (law.denoise(value, level) - value) / level**2

    return {"score": score}


class Drawing(Protocol):
    """A way to draw from a law that can denoise, such as `Reversed`."""

    def draw(self, law: Any, shape: Size, seed: int | None = None) -> Tensor:
        """Values `[*shape, *batch_shape, *event_shape]`."""
        ...


def reversed_by(how: Drawing) -> Conversion:
    """From a denoiser to draws, in a way of one's own."""

    def methods(law: Any) -> Methods:
        @torch.no_grad()
        def sample(sample_shape: Any = Size()) -> Tensor:
            """Draws along noise levels."""
            return how.draw(law, Size(sample_shape))

        return {"sample": sample}

    return Conversion("reverse-diffusion", _DENOISER, Capability.SAMPLE, Exactness.ESTIMATE, 10.0, methods)


def pathwise_by(how: Reversed) -> Conversion:
    """From a denoiser to draws that are differentiable in what the denoiser holds."""

    def methods(law: Any) -> Methods:
        return {"rsample": lambda sample_shape=Size(): how.draw(law, Size(sample_shape))}

    return Conversion("reverse-path", _DENOISER, Capability.RSAMPLE, Exactness.ESTIMATE, 20.0, methods)


def weighed_by(how: Flowing) -> Conversion:
    """From a denoiser to a log density, by the probability flow."""

    def methods(law: Any) -> Methods:
        return {"log_prob": lambda value: how.log_prob(law, value).value}

    return Conversion("probability-flow", _DENOISER, Capability.LOG_PROB, Exactness.ESTIMATE, 100.0, methods)


def bounded_by(how: Bounded) -> Conversion:
    """From a denoiser to a stochastic lower bound on the log density."""

    def methods(law: Any) -> Methods:
        return {"bound": lambda value: how.bound(law, value)}

    return Conversion(
        "denoising-bound", _DENOISER, Capability.BOUND, Exactness.LOWER_BOUND, 2.0, methods, random=True
    )


CONVERSIONS = (
    Conversion("tweedie", _DENOISER, Capability.SCORE, Exactness.EXACT, 1.0, _tweedie),
    reversed_by(Reversed()),
    pathwise_by(Reversed()),
    bounded_by(Bounded()),
    weighed_by(Flowing()),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(CONVERSIONS)
