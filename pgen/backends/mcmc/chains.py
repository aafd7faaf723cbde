"""Chains in progress: warm-up, then draws, in blocks that each have random numbers of their own.

    state = sampler.begin(start)                 seed (seed, "start")
    state, k = sampler.warm(state) ...           seed (seed, "warmup", iterations done)
    state = sampler.ready(state)
    state, block = sampler.run(state, BLOCK) ... seed (seed, "draws", draws done)

What a block gives is a function of the seed, of its place and of the state before it, so that chains can be put away
after any block and taken up again, by this process or another, with the same draws to the bit; and so that chains of
other groups can have their turn between two blocks (see `groups.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pgen.backends.mcmc.ledger import Block, Ledger, Memory, Shards, laid_out, leaves, plain, refilled, typed
from pgen.observers import Audience
from pgen.training.batches import derive

BLOCK = 100  # draws of each chain between two states that can be saved


class Sampler(Protocol):
    """A kernel with its way of warming up."""

    @property
    def warmup(self) -> int:
        """Iterations of warm-up, as far as is known beforehand."""
        ...

    def begin(self, position: Tensor) -> Any:
        """The state before warm-up, at positions `[C, d]`."""
        ...

    def warm(self, state: Any) -> tuple[Any, int]:
        """A block of the warm-up, and how many iterations it took."""
        ...

    def warmed(self, state: Any) -> bool:
        """Whether the warm-up is over."""
        ...

    def ready(self, state: Any) -> Any:
        """The state before the first draw."""
        ...

    def run(self, state: Any, draws: int) -> tuple[Any, Block]:
        """So many draws of each chain."""
        ...


@dataclass
class Chains:
    """A group of chains of one posterior, which learn from each other, on one device.

    Attributes:
        sampler: moves them.
        start: makes starting positions `[C, d]`.
        count: C.
        seed: determines every draw.
        ledger: keeps the draws.
        device: where they are.
        audience: is told of every block.
        seconds: spent on warm-up and on draws, in this process.
    """

    sampler: Sampler
    start: Callable[[], Tensor]
    count: int
    seed: int
    ledger: Ledger
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    audience: Audience = field(default_factory=lambda: Audience(()))
    seconds: dict[str, float] = field(default_factory=lambda: {"warmup": 0.0, "draws": 0.0})

    def template(self) -> Any:
        """A state before warm-up, where chains begin."""
        torch.manual_seed(derive(self.seed, "mcmc", "start"))
        return self.sampler.begin(self.start())

    def has(self, draws: int) -> bool:
        """Whether every chain has so many draws."""
        last = self.ledger.last()
        return last is not None and last[0] == "draws" and last[1] >= draws

    def advance(
        self, begun: Any, draws: int, seeded: Callable[[int], object] = torch.manual_seed
    ) -> Iterator[None]:
        """Go on until every chain has at least so many draws, pausing after every block.

        What is not yet on disk is written at the end, and where the iterator is closed or a block raises.

        Args:
            begun: a `template`.
            draws: of each chain.
            seeded: seeds the generators that these chains draw from.
        """
        phase, done, saved = self.ledger.last() or ("warmup", 0, plain(begun))
        try:
            if phase == "warmup":
                state = typed(saved, begun)
                while not self.sampler.warmed(state):
                    state, done = self._warm(state, done, seeded)
                    yield
                state, done = laid_out(self.sampler.ready(state)), 0
            else:
                state = typed(saved, self.sampler.ready(begun))
            while done < draws:
                state, done = self._draw(state, done, seeded)
                yield
        finally:
            if isinstance(self.ledger, Shards) and self.ledger.pending:
                self.ledger.flush(self._newest)

    def _warm(self, state: Any, done: int, seeded: Callable[[int], object]) -> tuple[Any, int]:
        began = time.perf_counter()
        seeded(derive(self.seed, "mcmc", "warmup", done))
        state, iterations = self.sampler.warm(state)
        state, done = laid_out(state), done + iterations
        self.ledger.warmed(done, plain(state))
        self.audience.step(done - 1, {"warmup": done})
        self.seconds["warmup"] += time.perf_counter() - began
        return state, done

    def _draw(self, state: Any, done: int, seeded: Callable[[int], object]) -> tuple[Any, int]:
        began = time.perf_counter()
        seeded(derive(self.seed, "mcmc", "draws", done))
        state, block = self.sampler.run(state, BLOCK)
        state, done = laid_out(state), done + len(block)
        self._newest = plain(state)
        self.ledger.drawn(block, self._newest)
        self.audience.step(self.sampler.warmup + done - 1, _report(block))
        self.seconds["draws"] += time.perf_counter() - began
        return state, done

    def saved(self) -> dict[str, Tensor]:
        """All draws, their statistics, and the state after them, as tensors by name."""
        found = self.ledger.last()
        if found is None:
            return {}
        phase, done, state = found
        tensors = {f"state/{i}": leaf for i, leaf in enumerate(leaves(state))}
        tensors["done"] = torch.tensor([phase == "draws", done], device="cpu")
        if phase == "draws":
            block = self.ledger.read()
            tensors |= {"positions": block.positions} | {f"stats/{k}": v for k, v in block.stats.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what another run has `saved`."""
        drawn, done = (int(x) for x in tensors["done"])
        with torch.random.fork_rng():
            template = self.template()
        template = self.sampler.ready(template) if drawn else template
        parts = iter([tensors[f"state/{i}"] for i in range(sum(k.startswith("state/") for k in tensors))])
        state = plain(refilled(template, parts))
        ledger = Memory()
        if drawn:
            stats = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("stats/")}
            ledger.drawn(Block(tensors["positions"], stats).to(self.device), state)
        else:
            ledger.warmed(done, state)
        self.ledger = ledger


def _report(block: Block) -> dict[str, float]:
    return {
        "accept": float(block.stats["acceptance_rate"].mean()),
        "diverging": float(block.stats["diverging"].double().mean()),
    }
