"""A law of strings that is known: a Markov chain, its entropy, and all its conditionals, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """A stationary Markov chain of so many steps.

    Attributes:
        move: transition probabilities `[K, K]`.
        places: length of a string.
    """

    move: Tensor
    places: int

    @staticmethod
    def random(levels: int, places: int, seed: int, concentration: float = 0.5) -> Chain:
        """One with rows drawn from a symmetric Dirichlet law."""
        generator = torch.Generator().manual_seed(seed)
        gamma = torch._standard_gamma(
            torch.full((levels, levels), concentration, dtype=torch.float64), generator=generator
        )
        return Chain((gamma + 1e-3) / (gamma + 1e-3).sum(-1, keepdim=True), places)

    @property
    def levels(self) -> int:
        return len(self.move)

    @property
    def start(self) -> Tensor:
        """The stationary law."""
        return torch.linalg.matrix_power(self.move, 2**20)[0]

    @property
    def entropy(self) -> float:
        """In nats, of a string."""
        pi, move = self.start, self.move
        return float(-(pi * pi.log()).sum() - (self.places - 1) * (pi[:, None] * move * move.log()).sum())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Strings `[n, places]`."""
        x = [torch.multinomial(self.start, n, replacement=True, generator=generator)]
        for _ in range(self.places - 1):
            x.append(torch.multinomial(self.move[x[-1]], 1, generator=generator)[:, 0])
        return torch.stack(x, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Of strings, in nats."""
        return self.start[x[:, 0]].log() + self.move[x[:, :-1], x[:, 1:]].log().sum(1)

    def every(self) -> Tensor:
        """All strings."""
        return torch.tensor(list(product(range(self.levels), repeat=self.places)))

    def network(self, tokens: Tensor) -> Tensor:
        """The true conditionals as logits, `[R, places, K]`, of tokens of which the number K is a mask.

        Messages from both sides (the forward-backward algorithm); a place does not hear of itself.
        """
        shown = torch.nn.functional.one_hot(tokens, self.levels + 1)[..., :-1].double()
        says = torch.where((tokens == self.levels)[..., None], 1.0, shown)
        before = [self.start.expand(len(tokens), -1)]
        after = [torch.ones_like(before[0])]
        for i in range(self.places - 1):
            before.append((before[-1] * says[:, i]) @ self.move)
            after.append((after[-1] * says[:, -1 - i]) @ self.move.T)
        return (torch.stack(before, 1) * torch.stack(after[::-1], 1)).log()

    def predict(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """`network`, as the algorithms want it."""
        return self.network(tokens)
