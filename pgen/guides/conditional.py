"""The conditional law of one latent: what it is given, a network, and a family."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pgen.guides.evidence import Slot
from pgen.guides.families import GAIN, Continuous, Discrete
from pgen.guides.gather import Gather, Source, require_sizes, stack_out
from pgen.guides.layout import Layout
from pgen.nn import MLP


class Conditional(nn.Module):
    """q(site | inputs): features gathered to the site's plates, and a network; `head` makes the law.

    A network is shared by the elements of every plate that the site keeps. Along the others (`folded`) each
    element has outputs of its own; their sizes are fixed.

    Args:
        name: the latent.
        head: its family.
        sources: the inputs; empty for a law with free parameters.
        folded: plates of the site whose elements have outputs of their own.
        positional: plates along which inputs are laid side by side rather than pooled.
        layout: sizes and dimensions of the plates.
        hidden: widths of the network; None for a linear map of the inputs that moves the location only.
        initial: outputs of all folded elements to start from; None: those of the family.
    """

    def __init__(
        self,
        name: str,
        head: Continuous | Discrete,
        sources: Sequence[Source],
        folded: Collection[str],
        positional: Collection[str],
        layout: Layout,
        hidden: Sequence[int] | None,
        initial: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.head = head
        plates, slots = layout.plates[name], layout.slots
        sizes = {p: slot.length for p, slot in slots.items()}
        self.depth = max((-slots[p].dim for p in plates), default=0)
        self.folded = tuple(sorted((p for p in plates if p in folded), key=lambda p: slots[p].dim))
        kept = [p for p in plates if p not in folded]
        self.gather = Gather(sources, kept, layout.inner_first(), positional, sizes)
        fixed = {*self.folded, *(plate for plate, _ in self.gather.steps if plate in positional)}
        self.sizes = {p: sizes[p] for p in fixed}
        self.copies = torch.Size(sizes[p] for p in self.folded).numel()
        inputs, initial = (
            self.gather.outputs,
            head.initial().repeat(self.copies) if initial is None else initial,
        )
        self.net: nn.Module | None = None
        self.bias: nn.Parameter | None = None
        if inputs and hidden is not None:
            self.net = MLP(inputs, len(initial), hidden, skip=True)
            self.net.last.bias = nn.Parameter(initial)
        else:
            self.bias = nn.Parameter(initial / GAIN)
            if inputs and head.located:
                self.net = nn.Linear(inputs, self.copies * head.located, bias=False)
                nn.init.zeros_(self.net.weight)

    def forward(self, features: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Tensor:
        """Outputs for the family, [*batch, size], from features of the inputs and the plates as they are now.

        Raises:
            DataError: a plate of fixed size has another size.
        """
        require_sizes(self.name, self.sizes, slots)
        outputs = stack_out(self._outputs(features, slots), [slots[p] for p in self.folded])
        while outputs.ndim - 1 > self.depth and outputs.shape[0] == 1:
            outputs = outputs.squeeze(0)
        return outputs

    def _outputs(self, features: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Tensor:
        if self.net is None:
            return GAIN * cast("Tensor", self.bias)
        moved = self.net(self.gather(features, slots))
        if self.bias is None:
            return moved
        rest = self.head.size - self.head.located
        linked = nn.functional.pad(moved.unflatten(-1, (self.copies, -1)), (0, rest)).flatten(-2)
        return GAIN * (self.bias + linked)
