r"""The No-U-Turn Sampler for many chains, none of which waits for another.

`tree.py` holds one leaf of the tree, for all chains; here it is repeated until every chain has its draws, and what
chains hand out at different times is put in order. Every chain gives exactly as many draws as asked for, so that
no chain with short trees counts more. A chain that has its draws goes on, unrecorded, until the last one has them.

References: see `tree.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity, Tuning, push
from pgen.algorithms.kernels.hmc import State, initial
from pgen.algorithms.kernels.iterate import Wrap, unwrapped
from pgen.algorithms.kernels.tree import Ended, Leaf, planned, planted, regrown


class Trees(NamedTuple):
    """About every draw: an `Info` and more, all `[draws, C]` (or `[C]`, of one step).

    Attributes:
        accept: acceptance probability, its mean over the leaves.
        energy: where the trajectory began, with its momentum.
        diverging: whether the integration error was so large that the trajectory was cut.
        evaluations: leapfrog steps.
        depth: how often the trajectory was doubled.
        step_size: that was used.
    """

    accept: Tensor
    energy: Tensor
    diverging: Tensor
    evaluations: Tensor
    depth: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class NUTS:
    """The No-U-Turn Sampler: multinomial, with biased progressive sampling and iterative trees.

    Attributes:
        max_depth: a trajectory is doubled at most so often; it has fewer than `2 ** max_depth` steps.
        look: leaves between two looks whether all chains have their draws; each look waits for the device.

    Example:
        >>> def normal(q): return -0.5 * q.square().sum(-1), -q
        >>> _ = torch.manual_seed(0)
        >>> kernel, state = NUTS(), initial(torch.zeros(100, 3), normal)
        >>> tuning = Tuning(torch.tensor(0.8), torch.ones(3), torch.tensor(1.0))
        >>> state, draws, trees = kernel.run(state, tuning, normal, 20)
        >>> draws.shape, trees.accept.shape
        (torch.Size([20, 100, 3]), torch.Size([20, 100]))
        >>> bool((draws[5:].var() - 1).abs() < 0.1)
        True
    """

    max_depth: int = 10
    look: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.max_depth <= 20:
            raise ValueError(f"NUTS(max_depth=...) is from 1 to 20, got {self.max_depth}")
        if self.look < 1:
            raise ValueError(f"NUTS(look=...) is at least 1, got {self.look}")

    def init(self, position: Tensor, target: LogDensity) -> State:
        """The state at a position `[C, d]`."""
        return initial(position, target)

    def step(self, state: State, tuning: Tuning, target: LogDensity) -> tuple[State, Trees]:
        """One iteration of every chain; here they do wait. Not recordable: `run` records the leaves."""
        state, _, trees = self.run(state, tuning, target, 1)
        return state, Trees(*(t[0] for t in trees))

    def run(
        self, state: State, tuning: Tuning, target: LogDensity, draws: int, wrap: Wrap = unwrapped
    ) -> tuple[State, Tensor, Trees]:
        """Iterate until every chain has given `draws` draws.

        Args:
            state: where the chains are.
            tuning: step size `[]` or `[C, 1]`, and scale.
            target: the log density and its gradient.
            draws: how many, of every chain.
            wrap: applied to the `Leaf` of this target, which is straight-line code, as is `record`. A wrap that remembers
                what it gave, such as `functools.cache(record)`, is asked anew in every run, and records once.

        Returns:
            the state after the last draw, the draws `[draws, C, d]`, and what is known about each.
        """
        leaf = wrap(Leaf(target))
        chains, d = state.position.shape
        levels = self._levels(0)
        plans = {}
        tree = planted(*state, tuning.scale, levels)
        count = tree.leaves
        harvest = [state.position.new_empty((draws * chains, *shape)) for shape in ((d,), (), (), (), ())]
        while True:
            if levels not in plans:
                plans[levels] = planned(state.position, levels, self.max_depth)
            batch = []
            for _ in range(self.look):
                tree, ended = leaf(tree, plans[levels], tuning)
                batch.append(ended)
            count = _gather(batch, count, harvest, draws)
            least, deepest = torch.stack([count.min(), tree.leaves.max()]).tolist()
            if least >= draws:
                break
            needed = self._levels(deepest)
            if needed != levels:
                tree, levels = regrown(tree, levels, needed), needed
        x, accept, leaves, diverging, start = (h.view(draws, chains, *h.shape[1:]) for h in harvest)
        positions = state.position + push(tuning.scale, x)
        depth = leaves.log2().floor() + 1  # a cut tree has fewer leaves than 2^depth - 1
        trees = Trees(
            accept / leaves, -start, diverging.bool(), leaves, depth, _per_chain(tuning.step_size, leaves)
        )
        return initial(positions[-1], target), positions, trees

    def _levels(self, deepest: int) -> int:
        """Sizes of parts to keep marks of, so that no tree outgrows its plan before the next look."""
        levels = min(4, max(self.max_depth - 1, 1))
        while 2 ** (levels + 1) - 1 < deepest + self.look and levels < self.max_depth - 1:
            levels = min(levels + 2, self.max_depth - 1)
        return levels


def _gather(batch: Sequence[Ended], count: Tensor, harvest: Sequence[Tensor], draws: int) -> Tensor:
    """Put what some leaves handed out in its place, `[draws * C, ...]`; gives the new count of draws `[C]`."""
    d = harvest[0].shape[1]
    batch = [ended._replace(draw=ended.draw[:, :d]) for ended in batch]
    ended = Ended(*(torch.stack(parts) for parts in zip(*batch, strict=True)))
    order = count + ended.done.cumsum(0)  # from 1
    leaf, chain = (ended.done & (order <= draws)).nonzero(as_tuple=True)
    row = (order[leaf, chain] - 1) * len(count) + chain
    for whole, part in zip(harvest, ended[1:], strict=True):
        whole[row] = part[leaf, chain].to(whole.dtype)
    return order[-1]


def _per_chain(step_size: Tensor, like: Tensor) -> Tensor:
    return (step_size.squeeze(-1) if step_size.dim() else step_size).expand_as(like)
