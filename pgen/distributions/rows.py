"""Calling a network on rows: every leading dimension flattened into one, as convolutions want it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Size, Tensor


def call_on_rows(
    network: Callable[..., Tensor],
    value: Tensor,
    event_shape: Size,
    batch_shape: Size,
    context: Tensor | None,
) -> Tensor:
    """Call `network(value)` or `network(value, context)` on flat rows and give the leading dimensions back.

    Args:
        network: takes `[rows, *event_shape]` and, where there is a context, `[rows, c]`.
        value: shape `[*lead, *event_shape]`, where `lead` ends in `batch_shape`.
        event_shape: shape of one value.
        batch_shape: batch shape of the distribution.
        context: shape `[*batch_shape, c]`, or None.

    Returns:
        Shape `[*lead, *rest]` where the network gave `[rows, *rest]`.
    """
    lead = value.shape[: value.ndim - len(event_shape)]
    rows = value.reshape(-1, *event_shape)
    if context is None:
        result = network(rows)
    else:
        wide = context.expand(*lead, context.shape[-1]).reshape(-1, context.shape[-1])
        result = network(rows, wide)
    return result.reshape((*lead, *result.shape[1:]))


def expand_context(context: Tensor | None, batch_shape: Size) -> Tensor | None:
    """The context for another batch shape: `[*batch_shape, c]`."""
    return None if context is None else context.expand(*batch_shape, context.shape[-1])
