"""A transformer over tokens, some of them masked, that hears every place from every other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pgen.errors import DataError, OptionError


class TokenTransformer(nn.Module):
    r"""Logits of the token at every place, from tokens of which some are masks.

    Each token and each place has a vector; their sum goes through pre-normalised blocks of self-attention,
    without any causal mask, and of a two-layer perceptron. The last map starts at zero, so that the network
    starts with all tokens equally likely.

    Args:
        places: how many tokens a value has, or its shape, whose product that is.
        levels: values 0, ..., levels - 1 of a token; the number `levels` is the mask.
        width: of the vectors.
        depth: number of blocks.
        heads: of attention; they share the width.
        outputs: numbers for each place; None for `levels`, the logits themselves. Fewer may do where the
            levels are ordered: see `pgen.distributions.ordinal_logits`.
        context: size of a second input, added to every place through a linear map; 0 for none.
        dropout: share of each block's outputs left out at random while training.

    Raises:
        OptionError: a size is not positive, or the heads do not divide the width.
        DataError: (when called) values of another size, or the context is missing.

    References:
        Attention is all you need (Vaswani et al., NeurIPS 2017). BERT (Devlin, Chang, Lee, Toutanova; NAACL
        2019). On layer normalization in the transformer architecture (Xiong et al., ICML 2020).

    Example:
        >>> import torch
        >>> net = TokenTransformer(8, levels=5, width=16)
        >>> net(torch.full((3, 8), 5)).shape
        torch.Size([3, 8, 5])
    """

    def __init__(
        self,
        places: int | Sequence[int],
        levels: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        *,
        outputs: int | None = None,
        context: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.places = places if isinstance(places, int) else math.prod(places)
        self.outputs, self.context = levels if outputs is None else outputs, context
        if min(self.places, levels, width, depth, heads, self.outputs) < 1 or context < 0 or width % heads:
            msg = (
                f"TokenTransformer(places={places}, levels={levels}, width={width}, depth={depth}, "
                f"heads={heads}, outputs={outputs}, context={context}): sizes must be positive whole numbers, and the heads must "
                "divide the width, e.g. TokenTransformer(8, levels=5, width=64, heads=4)."
            )
            raise OptionError(msg)
        self.token = nn.Embedding(levels + 1, width)
        self.place = nn.Parameter(torch.randn(self.places, width))
        self.given = nn.Linear(context, width) if context else None
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.outputs))
        for parameter in self.last[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map tokens `x` [rows, *shape] (and `context` [rows, context]) to numbers [rows, *shape, outputs]."""
        if x[:1].numel() != self.places and len(x):
            msg = (
                f"TokenTransformer got tokens of shape {tuple(x.shape)}; expected {self.places} for each row: "
                f"[rows, {self.places}], or a shape with that product after the rows."
            )
            raise DataError(msg)
        if (self.given is None) != (context is None):
            wanted = f"one of shape [rows, {self.context}]" if self.context else "none"
            msg = f"TokenTransformer got {'no' if context is None else 'a'} context; expected {wanted}."
            raise DataError(msg)
        y = self.token(x.reshape(len(x), self.places)) + self.place
        if self.given is not None and context is not None:
            y = y + self.given(context)[:, None]
        return self.last(self.blocks(y)).reshape(*x.shape, self.outputs)


class Block(nn.Module):
    """One block: self-attention, then a perceptron, each normalised before and added after.

    Args:
        width: of the vectors.
        heads: of attention.
        dropout: share of outputs left out at random while training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors [rows, places, width] to vectors of that shape."""
        query, key, value = (
            self.inward(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        heard = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.dropout(self.outward(heard.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.perceptron(self.norms[1](x)))
