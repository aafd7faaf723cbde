"""Whether a replay of a loss did what the loss does: gave the same numbers, and changed the same things.

What a loss changes are random states and buffers; both are put back before it is run once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.training.batches import generators
from pgen.training.players import Evaluation, copy_into


class Moment(NamedTuple):
    """What a loss may change besides its result, as it was at some time.

    Attributes:
        random: states of the random generators.
        buffers: copies of the buffers.
    """

    random: list[tuple[torch.Generator, Tensor]]
    buffers: dict[str, Tensor]

    @staticmethod
    def of(tensors: Sequence[Tensor], buffers: Mapping[str, Tensor]) -> Moment:
        """Now: on the devices of some tensors."""
        random = [(g, g.get_state()) for g in generators([t.device for t in tensors])]
        return Moment(random, {name: tensor.detach().clone() for name, tensor in buffers.items()})

    def restore(self, buffers: Mapping[str, Tensor]) -> None:
        """Go back to it."""
        for generator, state in self.random:
            generator.set_state(state)
        copy_into(buffers, self.buffers)


def alike(found: tuple[Evaluation, Moment], expected: tuple[Evaluation, Moment], tolerance: float) -> bool:
    """Whether two evaluations agree, the gradients as one vector; one wait for the device."""
    (one, after), (other, now) = found, expected
    if [g is None for g in one.gradients] != [g is None for g in other.gradients]:
        return False
    loss = other.loss.double()
    pairs = [
        (g, h) for g, h in zip(one.gradients, other.gradients, strict=True) if g is not None and h is not None
    ]
    verdicts = [
        _close(one.loss, loss, tolerance),
        *(_close(one.metrics[name], value, tolerance) for name, value in other.metrics.items()),
        *(_close(value, now.buffers[name], tolerance) for name, value in after.buffers.items()),
    ]
    if pairs:
        off = torch.stack([(g - h).double().square().sum() for g, h in pairs]).sum().sqrt()
        norm = torch.stack([h.double().square().sum() for _, h in pairs]).sum().sqrt()
        # Where terms cancel, round-off is all that is left.
        verdicts.append(off <= tolerance * (norm + 1e-2 * (1 + loss.abs())))
    # What is not finite is undone anyhow.
    return bool(
        torch.stack([v.to(loss.device) for v in verdicts]).all() | ~(loss.isfinite() | one.loss.isfinite())
    )


def _close(found: float | Tensor, expected: float | Tensor, tolerance: float) -> Tensor:
    left, right = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    scale = 1 + right.abs().nan_to_num(posinf=0.0)
    return (
        ((left - right).abs() <= tolerance * scale) | (left == right) | (left.isnan() & right.isnan())
    ).all()


def roundoff(tensors: Sequence[Tensor], context: Callable[[], AbstractContextManager[Any]]) -> float:
    """Of the coarsest type in use."""
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    with context():
        places = {t.device.type for t in tensors}
        kinds |= {torch.get_autocast_dtype(place) for place in places if torch.is_autocast_enabled(place)}
    return max(torch.finfo(kind).eps for kind in kinds)
