"""Values of any shape as flat rows of tokens, and a network over tokens that is asked in rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from pgen.algorithms.diffusion.masked import Predict
from pgen.algorithms.diffusion.masked_views import MOST
from pgen.distributions.rows import expand_context
from pgen.errors import DataError, OptionError, ProgramError


@dataclass(frozen=True)
class TokenRows:
    """A network over tokens and the shapes it works on.

    Attributes:
        network: from tokens `[rows, *event_shape]` (and a context `[rows, c]`) to logits `[rows,
            *event_shape, levels]`; the number `levels` stands for a hidden token.
        levels: how many values a token has.
        event_shape: shape of one value.
        batch_shape: of the law.
        context: shape `[*batch_shape, c]`, or None.
    """

    network: Callable[..., Tensor]
    levels: int
    event_shape: Size
    batch_shape: Size
    context: Tensor | None = None

    @property
    def places(self) -> int:
        """How many tokens a value has."""
        return math.prod(self.event_shape)

    @property
    def device(self) -> torch.device | None:
        """Where draws are made: with the context, or with the network."""
        if self.context is not None:
            return self.context.device
        parameters = getattr(self.network, "parameters", tuple)()
        return next((p.device for p in parameters), None)

    def few(self, asked: str, instead: str) -> None:
        """Raise OptionError where there are too many places to list all sets of them."""
        if self.places > MOST:
            raise OptionError(
                f"MaskedDiffusion: {asked} lists 2^{self.places} sets of places; it is for at most {MOST} places; "
                f"use {instead}"
            )

    def over(self, lead: Size) -> Predict:
        """The network over the flat rows of values `[*lead, *event_shape]`, each row with its own context."""
        wide = None if self.context is None else expand_context(self.context, lead)
        wide = None if wide is None else wide.reshape(lead.numel(), -1)

        def predict(tokens: Tensor, rows: Tensor) -> Tensor:
            shaped = tokens.reshape(len(tokens), *self.event_shape)
            logits = self.network(shaped) if wide is None else self.network(shaped, wide[rows])
            if logits.shape[:-1] != shaped.shape or logits.shape[-1] not in (self.levels, self.levels + 1):
                raise ProgramError(
                    f"the network of MaskedDiffusion gave logits of shape {tuple(logits.shape)} for tokens of "
                    f"shape {tuple(shaped.shape)}; expected {(*shaped.shape, self.levels)}: one for each level "
                    "at every place"
                )
            return logits[..., : self.levels].reshape(*tokens.shape, self.levels)

        return predict

    def flat(self, value: Tensor) -> tuple[Tensor, Size]:
        """Values `[..., *batch_shape, *event_shape]` as tokens `[rows, places]`, and the shape of the rows."""
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        lead = value.shape[: value.ndim - len(self.event_shape)]
        return value.long().reshape(lead.numel(), self.places), lead

    def flags(self, known: Tensor, lead: Size) -> Tensor:
        """Booleans that broadcast against values `[*lead, *event_shape]`, as `[rows, places]`.

        Raises:
            DataError: they are no booleans, or of another shape.
        """
        wanted = lead + self.event_shape
        try:
            fits = known.dtype == torch.bool and torch.broadcast_shapes(known.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise DataError(
                f"MaskedDiffusion: known has dtype {known.dtype} and shape {tuple(known.shape)}; expected booleans, True "
                f"where the value is given, that broadcast to {tuple(wanted)}"
            )
        return known.expand(wanted).reshape(lead.numel(), self.places)

    def partly(self, value: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Size]:
        """Tokens (0 where not known), which are known, and the shape of their rows; either broadcasts."""
        event = len(self.event_shape)
        leads = (t.shape[: max(0, t.ndim - event)] for t in (value, known))
        try:
            lead = torch.broadcast_shapes(*leads, self.batch_shape)
        except RuntimeError:
            lead = self.flat(value)[1]  # and `flags` says what is wrong
        tokens = value.expand(torch.broadcast_shapes(value.shape, lead + self.event_shape))
        given = self.flags(known.to(value.device), lead)
        return self.flat(tokens)[0].masked_fill(~given, 0), given, lead

    def order(self, order: Tensor, given: Tensor) -> list[int]:
        """Places in the order in which they are revealed.

        Raises:
            OptionError: one is named twice, is none, or is given already.
        """
        listed = order.tolist()
        distinct = order.dim() == 1 and len(set(listed)) == len(listed)
        if not distinct or not all(0 <= place < self.places for place in listed):
            raise OptionError(
                f"log_prob_in_order: order {listed} does not name distinct places of 0..{self.places - 1}; for a "
                f"random order: torch.randperm({self.places})"
            )
        if bool(given[:, listed].any()):
            raise OptionError(
                "log_prob_in_order: a place of the order is known already; leave it out of the order"
            )
        return listed
