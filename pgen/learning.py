"""How sites are learned where that is not how queries are answered: by conversions with a memory, made before the first step.

The log probability of an energy cannot be computed, and yet its gradient can be had: from chains, from noise, from scores.
Such a conversion gives a surrogate, good for its gradient alone. What it keeps from one step to the next (chains, a step
size, a guess of log Z) is a module: its parameters are learned with those of the program, its buffers saved with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pgen.conversion import Adapter, Conversion
from pgen.errors import OptionError
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure

_ROWS = 4096  # of the data that a memory is made from
ESCAPED = "escaped"
"""What a memory tells where chains left for good: a number that is then not finite."""


class Learner(Adapter):
    """How one site is learned: its memories are those of its conversions that have one."""

    def told(self) -> dict[str, Tensor]:
        """What the memories tell about the last step."""
        found: dict[str, Tensor] = {}
        for memory in self.memories.values():
            found |= getattr(memory, "told", {})
        return found

    def modules(self) -> nn.ModuleDict:
        """The memories, to be searched for tensors."""
        return nn.ModuleDict(dict(self.memories))


def learners_of(
    problem: Problem, structure: Structure, paths: Mapping[str, tuple[Conversion, ...]]
) -> dict[str, Learner]:
    """A learner for each site that has a path; memories are made from laws and values as they are before any learning."""
    if not paths:
        return {}
    rows = problem.rows or 0
    some = problem
    if rows > _ROWS:
        some = problem.take(torch.linspace(0, rows - 1, _ROWS).long())
    bare = replace(some, adapters={})
    with torch.no_grad(), validating(False):
        nodes: Any = poutine.trace(bare).get_trace().nodes
    return {name: _learner(path, nodes[name], structure.sites[name]) for name, path in paths.items()}


def _learner(path: tuple[Conversion, ...], node: Any, site: Any) -> Learner:
    fn, value, there = node["fn"], node["value"], torch.ones((), dtype=torch.bool)
    while getattr(fn, "capabilities", None) is None and hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):  # as where rows are missing
            there = there & torch.as_tensor(fn._mask)
        fn = fn.base_dist
    seen = None
    if site.observed:
        batch = value.shape[: value.ndim - len(fn.event_shape)]
        seen = value.reshape(-1, *fn.event_shape)[there.expand(batch).reshape(-1)]
    try:
        made = {c.name: c.memory(fn, seen, site) for c in path if c.memory is not None}
    except ValueError as error:
        raise OptionError(f"site {site.name!r} cannot be learned by {path[-1].name}: {error}") from error
    return Learner(path, made)


def incomparable(learners: Mapping[str, Learner]) -> str | None:
    """Why held-out losses of a program cannot be compared from step to step, if they cannot."""
    for site, learner in learners.items():
        for name, memory in learner.memories.items():
            if not getattr(memory, "scores", True):
                return (
                    f"the held-out loss at site {site!r}, learned by {name}, is an energy, whose constant moves while it is learned; "
                    f"via={{{site!r}: 'noise-contrastive'}} and others that compare or match (of scores, of neighbours) have one that can be compared"
                )
    return None


def watched(learners: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that must stay finite, by name, each with its meaning."""
    return {
        f"{site}.{ESCAPED}": f"energy at site {site!r}, whose chains leave the data for good (no finite integral: it is unbounded "
        f"below; give Energy(..., base=...) or an energy that grows), as seen in {site}.{ESCAPED}, a loss"
        for site in learners
    }
