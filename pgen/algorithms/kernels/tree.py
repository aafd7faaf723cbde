r"""One leaf of a no-U-turn tree for every chain, as straight-line code without a wait.

A trajectory grows by doubling: a new half, as long as all before it, is walked off one of the two ends, until the
ends of the whole or of any aligned part of it turn towards each other. Chains need different numbers of doublings, and
batched samplers wait for the longest. Here the unit of work is one leapfrog step, a *leaf*, of every chain. Each
chain keeps what it knows about its own tree; when that is complete, the chain hands out its draw and begins the next
tree within the same leaf. No chain waits.

What a chain has to remember:

- The two ends, with outward momenta: `near`, which grows, and `far`. Growing on the other side is to swap them; no
  sign of time is needed.
- Two draws: of the tree so far, and of the `branch` (the half in progress), which is thrown away if it turns.
- For every size of aligned part, where the one in progress began (`marks`). The part that leaf n ends began at a
  leaf whose mark is found from the bits of n, so d numbers a level suffice, without recursion.

How many leaves the tree has decides which marks are written and compared, and when a branch is complete. That is a
table (`plan`), and the leaf looks it up.

Positions are kept in whitened coordinates x around a fixed origin per chain, q = origin + scale x. There the metric is
the identity, x is (step size times) the sum of the momenta at half steps, and two points turn if their difference
points against one of their momenta, as in the paper of 2014.

References:
    The No-U-Turn Sampler (Hoffman & Gelman, JMLR 15, 2014), arXiv:1111.4246. A Conceptual Introduction to
    Hamiltonian Monte Carlo (Betancourt, 2017), arXiv:1701.02434; appendix A for multinomial and biased progressive
    sampling. Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro (Phan, Pradhan &
    Jankowiak, 2019), arXiv:1912.11554: the marks. Efficiently Vectorized MCMC on Modern Accelerators (Dance, Glaser,
    Orbanz & Adams, ICML 2025), arXiv:2503.17405: chains as state machines out of step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity, Tuning, pull
from pgen.algorithms.kernels.hmc import DIVERGENT, gained, log_joint, standard_normal

_LOG_HALF = math.log(0.5)
_NEVER, _ALWAYS = -math.inf, math.inf  # thresholds below which two ends are said to turn


class Plan(NamedTuple):
    """What stays the same for all leaves of a run. M is the size of the largest tree that it foresees.

    Attributes:
        origin: `[C, d]`; where whitened coordinates begin.
        routes: `[3, 2, C]`; which rows become near and far ends, if the tree grows on, turns round, or is new.
        slot: `[M]`; in which of the `levels` slots the mark of the m-th leaf goes; one beyond (the bin) if none is
            needed. Times C.
        base: `[C]`; the row of each chain in a slot.
        parts: `[levels, M]`; leaf and mark turn if they point along each other less than this: 0 where they end an
            aligned part, minus infinity where they do not.
        whole: `[M]`; the same for leaf and far end: 0 where the branch is complete, plus infinity where the tree must
            end there.
    """

    origin: Tensor
    routes: Tensor
    slot: Tensor
    base: Tensor
    parts: Tensor
    whole: Tensor


class Tree(NamedTuple):
    """The trees of C chains in progress. Points are rows `p | x | ∇ | log density`, draws the same without p.

    Attributes:
        ends: `[2C, 3d + 1]`; the near ends, then the far ones.
        draw: `[C, 2d + 1]`; of the tree.
        branch: `[C, 2d + 1]`; of the branch.
        marks: `[(levels + 1) C, 2d]`; momentum and x at marked leaves, slot by slot; the last slot is a bin.
        start: `[C]`; log joint density where the tree began, from which weights are counted.
        weight: `[C]`; log of the summed weights of the tree.
        branch_weight: `[C]`; of the branch.
        accept: `[C]`; acceptance probabilities of its leaves, summed.
        leaves: `[C]`; how many there are.
    """

    ends: Tensor
    draw: Tensor
    branch: Tensor
    marks: Tensor
    start: Tensor
    weight: Tensor
    branch_weight: Tensor
    accept: Tensor
    leaves: Tensor


class Ended(NamedTuple):
    """What a leaf hands out.

    Attributes:
        done: `[C]`; which chains finished a tree. The rest means something for these alone.
        draw: `[C, 2d + 1]`; whitened coordinates, gradient, log density.
        accept: `[C]`; summed acceptance probabilities.
        leaves: `[C]`.
        diverging: `[C]`.
        start: `[C]`; log joint density where the tree began.
    """

    done: Tensor
    draw: Tensor
    accept: Tensor
    leaves: Tensor
    diverging: Tensor
    start: Tensor


@dataclass(frozen=True)
class Leaf:
    """One leapfrog step of every chain, and all that follows from it.

    Two leaves of one target are equal, so that what is recorded of one can be found again for the other.
    """

    target: LogDensity

    def __call__(self, tree: Tree, plan: Plan, tuning: Tuning) -> tuple[Tree, Ended]:
        """The trees with one more leaf, and the draws of those that it completed."""
        ends, draw, branch, marks, start, weight, branch_weight, accept, leaves = tree
        chains, d = plan.origin.shape
        levels = len(plan.parts)

        # Leapfrog in whitened coordinates.
        near, far = ends.chunk(2)
        p, x, gradient, _ = near.split((d, d, d, 1), 1)
        p = torch.addcmul(p, tuning.step_size, gradient, value=0.5)
        x = torch.addcmul(x, tuning.step_size, p)
        log_density, gradient = self.target(outwards(plan.origin, tuning.scale, x))
        gradient = pull(tuning.scale, gradient)
        p = torch.addcmul(p, tuning.step_size, gradient, value=0.5)
        gain = gained(log_joint(log_density, p), start)
        new = torch.cat([p, x, gradient, log_density.unsqueeze(-1)], 1)

        # The draw of the branch: each leaf by its weight, exp(gain).
        log_u, log_v, log_coin = torch.rand(3, chains, dtype=x.dtype, device=x.device).log_().unbind()
        branch_weight = torch.logaddexp(branch_weight, gain)
        taken = gain > branch_weight + log_u
        branch = torch.where(taken.unsqueeze(-1), new.narrow(1, d, 2 * d + 1), branch)
        accept = accept + gain.clamp(max=0.0).exp()
        diverging = gain < -DIVERGENT

        # Has an aligned part that ends here turned? Has the whole?
        mark_p, mark_x = marks.narrow(0, 0, levels * chains).view(levels, chains, 2 * d).split(d, -1)
        along = x - mark_x
        closest = torch.minimum((along * mark_p).sum(-1), (along * p).sum(-1))
        stuck = (closest <= plan.parts.index_select(1, leaves)).any(0) | diverging
        far_p, far_x, _ = far.split((d, d, d + 1), 1)
        along = x - far_x
        closest = torch.minimum((along * p).sum(-1), -(along * far_p).sum(-1))
        whole = plan.whole.index_select(0, leaves)
        merged = (whole > _NEVER) > stuck  # complete and sound
        done = stuck >= (closest > whole)  # or not: whatever is no number ends the tree
        slot = plan.slot.index_select(0, leaves) + plan.base
        marks = marks.index_copy(0, slot, new.narrow(1, 0, 2 * d))
        leaves = leaves + 1

        # The draw of the tree: that of a complete branch, with a bias away from where it began.
        adopted = (branch_weight > weight + log_v) & merged
        draw = torch.where(adopted.unsqueeze(-1), branch, draw)
        weight = torch.where(merged, torch.logaddexp(weight, branch_weight), weight)

        # A complete branch: grow on, on either side. A complete tree: a new one, from its draw.
        momentum = standard_normal(p)
        rows = torch.cat([new, far, torch.cat([momentum, draw], 1), torch.cat([-momentum, draw], 1)])
        ahead, round_, anew = plan.routes.unbind()
        route = torch.where(done, anew, torch.where((log_coin < _LOG_HALF) & merged, round_, ahead))
        restart = log_joint(draw.select(1, 2 * d), momentum)
        following = Tree(
            rows.index_select(0, route.view(-1)),
            draw,
            branch,
            marks,
            torch.where(done, restart, start),
            weight.masked_fill(done, 0.0),
            branch_weight.masked_fill(merged | done, -math.inf),
            accept.masked_fill(done, 0.0),
            leaves.masked_fill(done, 0),
        )
        return following, Ended(done, draw, accept, leaves, diverging, start)


def outwards(origin: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """From whitened coordinates around `origin` `[C, d]` to positions, `origin + scale x`; x `[C, d]`."""
    return torch.addcmul(origin, x, scale) if scale.dim() < 2 else torch.addmm(origin, x, scale.mT)


def planted(position: Tensor, log_density: Tensor, gradient: Tensor, scale: Tensor, levels: int) -> Tree:
    """New trees at `position` `[C, d]`, where log density `[C]` and gradient `[C, d]` are given."""
    chains, d = position.shape
    momentum = standard_normal(position)
    draw = torch.cat([torch.zeros_like(position), pull(scale, gradient), log_density.unsqueeze(-1)], 1)
    none = torch.zeros_like(log_density)
    return Tree(
        ends=torch.cat([torch.cat([momentum, draw], 1), torch.cat([-momentum, draw], 1)]),
        draw=draw,
        branch=torch.zeros_like(draw),
        marks=position.new_zeros((levels + 1) * chains, 2 * d),
        start=log_joint(log_density, momentum),
        weight=none,
        branch_weight=torch.full_like(none, -math.inf),
        accept=none.clone(),
        leaves=torch.zeros_like(none, dtype=torch.int64),
    )


def planned(origin: Tensor, levels: int, max_depth: int) -> Plan:
    """The plan of chains that begin at `origin` `[C, d]`, for trees of up to `2^(levels + 1) - 1` leaves.

    A tree of depth j has 2^j points: where it began, and 2^j - 1 leaves; leaf m is the n-th of the branch that doubles
    the tree from 2^j points, m = 2^j - 1 + n. An aligned part of 2^s leaves ends with leaf n if the last s bits of n are
    ones. Marks are kept by the number of ones in the bits of their n, but the last: of all parts in progress at a time,
    no two agree in that.
    """
    chains, device = len(origin), origin.device
    leaf = torch.arange(1, min(2 ** (levels + 1), 2**max_depth), device=device)  # m + 1
    bits = 2 ** torch.arange(levels + 1, device=device)
    depth = (leaf.unsqueeze(-1) >= 2 * bits).sum(-1)
    n = leaf - 2**depth
    ones = (n.unsqueeze(-1) & bits != 0).long()
    odd = ones[:, 0] == 1
    first = ones[:, 1:].sum(-1)
    ending = ones.cumprod(-1).sum(-1)  # sizes of aligned parts that end here
    slots = torch.arange(levels, device=device).unsqueeze(-1)
    compared = odd & (slots <= first) & (slots > first - ending)
    complete = n + 1 == 2**depth
    parts = origin.new_full((levels, len(leaf)), _NEVER)
    parts[compared] = 0.0
    whole = origin.new_full((len(leaf),), _NEVER)
    whole[complete] = 0.0
    whole[complete & (depth + 1 == max_depth)] = _ALWAYS
    rows = torch.arange(4 * chains, device=device).view(4, chains)  # near, far, new near, new far
    routes = torch.stack([rows[:2], rows[:2].flip(0), rows[2:]])
    return Plan(origin, routes, torch.where(odd, levels, first) * chains, rows[0].clone(), parts, whole)


def regrown(tree: Tree, before: int, levels: int) -> Tree:
    """The trees with room for the marks of `levels` sizes instead of `before`."""
    chains = tree.leaves.shape[0]
    marks = tree.marks.new_zeros((levels + 1) * chains, tree.marks.shape[1])
    kept = min(before, levels) * chains
    marks[:kept] = tree.marks[:kept]
    return tree._replace(marks=marks)
