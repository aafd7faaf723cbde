"""Chains in progress: warm-up, then draws, in blocks that each have random numbers of their own.

    state = sampler.begin(start)                 seed (seed, "start")
    state, k = sampler.warm(state) ...           seed (seed, "warmup", iterations done)
    state = sampler.ready(state)
    state, block = sampler.run(state, BLOCK) ... seed (seed, "draws", draws done)

What a block gives is a function of the seed, of its place and of the state before it, so that chains can be put away
after any block and taken up again, by this process or another, with the same draws to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pgen.backends.mcmc.ledger import Block, Ledger, Shards, laid_out, plain, typed
from pgen.history import History
from pgen.observers import Audience
from pgen.threads import Work, threads_restored, use_threads
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
    """Chains of one posterior.

    Attributes:
        sampler: moves them.
        start: makes starting positions `[C, d]`.
        count: C.
        seed: determines every draw.
        ledger: keeps the draws.
        seconds: spent on warm-up and on draws, in this process.
    """

    sampler: Sampler
    start: Callable[[], Tensor]
    count: int
    seed: int
    ledger: Ledger
    audience: Audience = field(default_factory=lambda: Audience(()))
    seconds: dict[str, float] = field(default_factory=lambda: {"warmup": 0.0, "draws": 0.0})

    def template(self) -> Any:
        """A state before warm-up, where chains begin."""
        torch.manual_seed(derive(self.seed, "mcmc", "start"))
        return self.sampler.begin(self.start())

    def extend(self, draws: int) -> None:
        """Go on until every chain has at least so many draws; Ctrl-C keeps those that are there."""
        last = self.ledger.last()
        if last is not None and last[0] == "draws" and last[1] >= draws:
            return
        with threads_restored() as available:
            with Work() as work:
                begun = self.template()
            use_threads(work.threads(available))
            self._extend(begun, draws, last or ("warmup", 0, plain(begun)))

    def _extend(self, begun: Any, draws: int, last: tuple[str, int, Any]) -> None:
        phase, done, saved = last
        try:
            if phase == "warmup":
                saved, done = self._warmed(typed(saved, begun), done), 0
                state = laid_out(self.sampler.ready(saved))
            else:
                state = typed(saved, self.sampler.ready(begun))
            self._drawn(state, done, draws)
        except KeyboardInterrupt:
            there = self.ledger.last()
            if there is None or there[0] != "draws":
                raise
        finally:
            if isinstance(self.ledger, Shards) and self.ledger.pending:
                self.ledger.flush(self._newest)

    def _warmed(self, state: Any, done: int) -> Any:
        began = time.perf_counter()
        while not self.sampler.warmed(state):
            torch.manual_seed(derive(self.seed, "mcmc", "warmup", done))
            state, iterations = self.sampler.warm(state)
            state = laid_out(state)
            done += iterations
            self.ledger.warmed(done, plain(state))
            self.audience.step(done - 1, {"warmup": done})
        self.seconds["warmup"] += time.perf_counter() - began
        return state

    def _drawn(self, state: Any, done: int, draws: int) -> None:
        began = time.perf_counter()
        while done < draws:
            torch.manual_seed(derive(self.seed, "mcmc", "draws", done))
            state, block = self.sampler.run(state, BLOCK)
            state = laid_out(state)
            self._newest = plain(state)
            self.ledger.drawn(block, self._newest)
            done += len(block)
            self.audience.step(self.sampler.warmup + done - 1, _report(block))
        self.seconds["draws"] += time.perf_counter() - began

    def history(self) -> History:
        """Acceptance and log density by draw, means over the chains."""
        block = self.ledger.read()
        means = {name: series.double().mean(-1) for name, series in block.stats.items()}
        total = self.seconds["warmup"] + self.seconds["draws"]
        times = torch.linspace(self.seconds["warmup"], total, len(block) + 1, dtype=torch.float64)[1:]
        moved = getattr(self.sampler, "moved", 0)
        said = (
            f"{moved} of {self.count} chains had warmed up in a place of hardly any mass, and began anew "
            "beside others"
        )
        return History(
            metrics={**means, "seconds": times},
            steps=len(block),
            seconds=total,
            seed=self.seed,
            warnings=(said,) if moved else (),
        )


def _report(block: Block) -> dict[str, float]:
    return {
        "accept": float(block.stats["acceptance_rate"].mean()),
        "diverging": float(block.stats["diverging"].double().mean()),
    }
