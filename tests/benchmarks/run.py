"""What a step of `Run.optimize` costs over the plainest torch loop, for a model that is nearly free.

    python -m tests.benchmarks.run

Prints microseconds of processor time per step, the least of many short rounds taken in turn (so that other
work on the machine matters little), and exits with 1 where the loop costs 100 microseconds or more over the
bare one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from pgen.problem import Problem
from pgen.run import Player, Run

STEPS, ROWS, BATCH, ROUNDS = 500, 1000, 32, 15
LIMIT = 100e-6

DATA = torch.randn(ROWS, 8)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def bare(fused: bool = False) -> float:
    """Index a permutation, forward, backward, Adam: no watch, no history, no clipping."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    per_epoch = ROWS // BATCH
    began = time.process_time()
    for step in range(STEPS):
        if step % per_epoch == 0:
            order = torch.randperm(ROWS)
        start = step % per_epoch * BATCH
        batch = DATA[order[start : start + BATCH]]
        optimizer.zero_grad()
        loss = net(batch).square().mean()
        loss.backward()
        optimizer.step()
    return (time.process_time() - began) / STEPS


def run(**options: object) -> float:
    """The same through `Run.optimize`, on the rows of a `Problem`."""
    net = network()
    problem = Problem.of(lambda x: x, {"x": DATA})
    player = Player(
        dict(net.named_parameters()), lambda batch, step: (net(batch.inputs["x"]).square().mean(), {})
    )
    began = time.process_time()
    Run(steps=STEPS, batch_size=BATCH, progress=False, **options).optimize({"net": player}, problem)
    return (time.process_time() - began) / STEPS


CASES: dict[str, Callable[[], float]] = {
    "bare loop, torch.optim.Adam": bare,
    "bare loop, fused Adam": lambda: bare(fused=True),
    "Run": run,
    "Run, no clipping": lambda: run(clip_norm=None),
    "Run, moving average": lambda: run(ema=0.99),
}


def main() -> int:
    """Measure in turn, print, judge."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(ROUNDS):
        for name, case in CASES.items():
            best[name] = min(best[name], case())
    plain, fused = best["bare loop, torch.optim.Adam"], best["bare loop, fused Adam"]
    print(f"{'':30}{'us/step':>10}{'over Adam':>12}{'over fused':>12}")
    for name, seconds in best.items():
        print(
            f"{name:30}{seconds * 1e6:10.1f}{(seconds - plain) * 1e6:+12.1f}{(seconds - fused) * 1e6:+12.1f}"
        )
    over = best["Run"] - plain
    print(f"over the bare loop: {over * 1e6:+.1f} us per step (limit {LIMIT * 1e6:.0f})")
    return 0 if over < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
