"""Whether a replay gives what the function gave; and leaving the world as it was while that is tried.

Every recording is run on the inputs that it was made of, once, before it is trusted: results, what was changed in
place, and where the random generators end up must be those of the function. That costs one more evaluation and covers
what no rule foresees.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pgen.algorithms.record.tape import Tape, memory

_SLACK = 2048  # units of rounding, relative to the largest number
_here = threading.local()
_COARSEST = 0.05  # for types in which that would be everything


def copied(value: Tensor) -> Tensor:
    """A copy with the same strides, overlapping or not."""
    value = value.detach().resolve_conj().resolve_neg()
    if value.numel() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    flat = value.as_strided((extent,), (1,)).clone()
    return flat.as_strided(value.shape, value.stride())


@dataclass(frozen=True)
class World:
    """What a run changes besides its own tensors, as it was before.

    Attributes:
        dice: states of torch's random generators.
        generators: other generators that the function was given, with their states.
        saved: tensors that the function changes in place, each with a copy.
    """

    dice: tuple[Tensor, ...]
    generators: Sequence[tuple[torch.Generator, Tensor]] = ()
    saved: Sequence[tuple[Tensor, Tensor]] = ()

    @staticmethod
    def now() -> World:
        """The random generators as they are."""
        return World(dice())

    def restore(self) -> None:
        """Put everything back."""
        torch.set_rng_state(self.dice[0])
        for device, state in zip(_devices(), self.dice[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        for generator, state in self.generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, copy in self.saved:
                # Whoever watches a tensor is not to think that it was changed, when it was not.
                if not torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8)):
                    tensor.copy_(copy)

    def found(self) -> list[Tensor]:
        """The same things as they are now, copied."""
        return [
            *dice(),
            *(generator.get_state() for generator, _ in self.generators),
            *(tensor.clone() for tensor, _ in self.saved),
        ]


def dice() -> tuple[Tensor, ...]:
    """States of torch's random generators."""
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices()))


def _devices() -> Sequence[int | torch.device]:
    """The CUDA devices whose generators are looked at and put back."""
    if not torch.cuda.is_initialized():
        return ()
    return getattr(_here, "devices", None) or range(torch.cuda.device_count())


@contextlib.contextmanager
def confined(device: torch.device) -> Iterator[None]:
    """In this thread all is computed on one device: recordings leave the generators of others alone, for their threads."""
    _here.devices = [device]
    try:
        yield
    finally:
        del _here.devices


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Out of sight of recordings that are going on; casts that were made before are not used again."""
    cached = torch.is_autocast_cache_enabled()
    with _disable_current_modes(), torch.inference_mode(False):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Out of sight, without gradients and without automatic casts."""
    with unseen(), torch.no_grad(), uncast():
        yield


@contextlib.contextmanager
def uncast() -> Iterator[None]:
    """Without automatic casts: those that were made are on the tape."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass(frozen=True)
class Outcome:
    """What a run gave and did.

    Attributes:
        results: its outputs.
        inputs: its inputs afterwards.
        rest: random generators and other tensors afterwards.
    """

    results: list[Tensor]
    inputs: list[Tensor]
    rest: list[Tensor]

    def differs(self, other: Outcome, *, strides: bool = True) -> str | None:
        """In what another run of the same function on the same inputs differs, if it does."""
        for at, (mine, its) in enumerate(zip(self.results, other.results, strict=True)):
            if not close(mine, its, strides=strides):
                return f"result {at}"
        if not all(close(a, b) for a, b in zip(self.inputs, other.inputs, strict=True)):
            return "an input that is changed in place"
        if not all(close(a, b) for a, b in zip(self.rest, other.rest, strict=True)):
            return "the random numbers drawn, or a tensor that is changed in place"
        return None


@dataclass(frozen=True)
class Trial:
    """The inputs of one run, on which tapes are tried.

    Attributes:
        inputs: never changed; every run gets copies.
        world: put back after every run.
    """

    inputs: Sequence[Tensor]
    world: World

    @staticmethod
    def on(tape: Tape, inputs: Sequence[Tensor]) -> Trial:
        """On some inputs, with the world as it is now."""
        # Any constant may be written to through a view.
        writes = any(op.writes() for op in tape.ops)
        saved = {memory(c): whole(c) for c in tape.constants.values()} if writes else {}
        leaves = (a for op in tape.ops for a in (*op.args, *op.kwargs.values()))
        generators = {id(a): a for a in leaves if isinstance(a, torch.Generator)}
        world = World(
            dice(),
            tuple((g, g.get_state()) for g in generators.values()),
            tuple((t, t.clone()) for t in saved.values()),
        )
        return Trial(inputs, world)

    @contextlib.contextmanager
    def copies(self) -> Iterator[list[Tensor]]:
        """Copies of the inputs to run something on."""
        self.world.restore()
        try:
            yield [copied(t) for t in self.inputs]
        finally:
            self.world.restore()

    def values(self, tape: Tape) -> dict[int, Tensor]:
        """Every tensor of a run of a tape, by number."""
        with self.copies() as copies:
            return tape.run(copies)

    def outcome(self, run: Callable[..., Sequence[Tensor]]) -> Outcome:
        """What a replay gives and does."""
        with self.copies() as copies:
            results = [copied(t) for t in run(*copies)]
            return Outcome(results, copies, self.world.found())


def close(one: Tensor, other: Tensor, *, strides: bool = True) -> bool:
    """Whether two tensors hold the same numbers, to round-off, in the same layout."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if strides and layout(one) != layout(other):
        return False
    if one.is_meta:
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    if one.numel() == 0 or torch.equal(one, other):
        return True
    finite = torch.isfinite(one)
    scale = float(one.abs().where(finite, 0).max())
    slack = min(_SLACK * torch.finfo(one.dtype).eps, _COARSEST)
    return torch.allclose(one, other, rtol=slack, atol=slack * scale, equal_nan=True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's memory as one vector of its type."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def layout(value: Tensor) -> tuple[int, ...]:
    """The strides that matter."""
    if value.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
