"""How parameters move: optimisers by name, learning-rate schedules, averages of parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pgen.algorithms.diffusion.averaging import power_decay, power_of
from pgen.errors import OptionError
from pgen.training.adam import Adam

Factory = Callable[[list[Tensor]], Optimizer]
Schedule = Callable[[int, int], float]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
DEFAULT_LR = 1e-3
FUSED = {"adam": 0.0, "adamw": 1e-2}  # there is one kernel for all tensors; with torch's default weight decay

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: 0.01**done,
}
"""Factor of the learning rate by the fraction of the run, after warm-up, that is done."""


def make_optimizer(
    kind: str | Factory, tensors: list[Tensor], lr: float | None = None, weight_decay: float | None = None
) -> Adam | Optimizer:
    """An optimiser of the tensors: by name, or what the callable gives.

    Args:
        kind: a key of `OPTIMIZERS`, or a callable from a list of tensors to a `torch.optim.Optimizer`.
        tensors: what it moves.
        lr: learning rate; None means 1e-3 for one made by name, the callable's own otherwise.
        weight_decay: None means the optimiser's default.
    """
    if isinstance(kind, str):
        rate = DEFAULT_LR if lr is None else lr
        if kind in FUSED and all(t.is_floating_point() and t.device.type in ("cpu", "cuda") for t in tensors):
            return Adam(tensors, rate, FUSED[kind] if weight_decay is None else weight_decay, kind == "adamw")
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        return OPTIMIZERS[kind](tensors, lr=rate, **decay)  # type: ignore[call-arg]
    made = kind(tensors)
    if not isinstance(made, Optimizer):
        raise OptionError(
            f"Run(optimizer={kind!r}): the callable gave {type(made).__name__}; expected a "
            "torch.optim.Optimizer, for example Run(optimizer=lambda params: torch.optim.SGD(params, "
            "lr=0.1, momentum=0.9))"
        )
    if lr is not None:
        for group in made.param_groups:
            group["lr"] = lr
    return made


@contextmanager
def uncompiled() -> Iterator[None]:
    """Make an optimiser of `torch.optim` without importing torch's compiler, which takes over a second.

    Torch would import it to mark one function as none of its business.
    """
    marked = Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    name = "__dynamo_disable"
    if "torch._dynamo" in sys.modules or hasattr(marked, name):
        yield
        return
    setattr(marked, name, marked)
    try:
        yield
    finally:
        delattr(marked, name)


@dataclass(frozen=True)
class Rate:
    """The factor of the learning rate at every step, a pure function of the step.

    It rises linearly over the first `warmup` steps, then follows the schedule over the rest.

    >>> rate = Rate("linear", steps=6, warmup=2)
    >>> [rate(i) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    schedule: str | Schedule
    steps: int
    warmup: int = 0

    def __call__(self, index: int) -> float:
        """The factor at step `index`, counted from 0."""
        rise = min(1.0, (index + 1) / self.warmup) if self.warmup else 1.0
        if not isinstance(self.schedule, str):
            return rise * float(self.schedule(index, self.steps))
        done = max(0, index - self.warmup) / max(1, self.steps - self.warmup)
        return rise * SCHEDULES[self.schedule](min(1.0, done))


def width_of(ema: str) -> float:
    """The share of the training that an average remembers, from the option "power:0.1".

    Raises:
        ValueError: it is none.
    """
    kind, _, width = ema.partition(":")
    if kind != "power":
        raise ValueError(f"ema={ema!r}: expected 'power:' and a share of the training, as in 'power:0.1'")
    power_of(float(width))
    return float(width)


@dataclass
class Average:
    """Exponential moving average of tensors that are trained in place.

    With decay d the average moves by 1 - min(d, (1 + t) / (10 + t)) after update t, so that it forgets where
    training began (the rule of TensorFlow's ExponentialMovingAverage). Or its memory is a share of the training so far
    (see `pgen.algorithms.diffusion.averaging`).

    Attributes:
        sources: the tensors that training moves.
        decay: d, from an update t counted from 1.
        values: their averages.
        updates: t.
    """

    sources: Sequence[Tensor]
    decay: Callable[[int], float]
    values: list[Tensor] = field(init=False)
    updates: int = 0

    def __post_init__(self) -> None:
        """Begin at the present values."""
        self.values = [tensor.detach().clone() for tensor in self.sources]

    @staticmethod
    def decay_of(ema: float | str) -> Callable[[int], float]:
        """The decay that an option means: a number below 1, a half-life in steps, or "power:" and a share.

        >>> half_life, power = Average.decay_of(10), Average.decay_of("power:0.1")
        >>> round(half_life(1000), 4), round(power(1000), 4)
        (0.933, 0.9921)
        """
        if isinstance(ema, str):
            power = power_of(width_of(ema))
            return lambda t: power_decay(t, power)
        decay = ema if ema < 1 else 0.5 ** (1.0 / ema)
        return lambda t: min(decay, (1 + t) / (10 + t))

    def update(self) -> None:
        """Move towards the present values."""
        self.updates += 1
        decay = self.decay(self.updates)
        get_ema_multi_avg_fn(decay)(self.values, list(self.sources), self.updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the present values; twice is nothing."""
        for value, source in zip(self.values, self.sources, strict=True):
            held = value.clone()
            value.copy_(source)
            source.copy_(held)
