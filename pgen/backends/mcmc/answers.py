"""Queries on chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgen.backends.mcmc.chains import Chains
from pgen.backends.mcmc.ledger import Block, Memory, plain
from pgen.capability import Estimate
from pgen.density import Density
from pgen.draws import Draws
from pgen.evaluation import Functions
from pgen.history import History
from pgen.problem import Problem
from pgen.sampling import draw
from pgen.structure import Structure


@dataclass
class Sampled:
    """A problem, its density and its chains.

    Attributes:
        problem: the program with its data.
        structure: its structure.
        density: of its latents.
        functions: how the density is computed.
        chains: that sample it.
        draws: how many each chain gives without being asked for more.
        read: from positions `[n, d]` to values by site, `[n, *shape]`.
    """

    problem: Problem
    structure: Structure
    density: Density
    functions: Functions
    chains: Chains
    draws: int
    read: Callable[[Tensor], dict[str, Tensor]]

    def positions(self, n: int) -> tuple[Tensor, dict[str, Tensor], int]:
        """`n` draws, evenly over the chains and over their length; the first `n % chains` chains give one more.

        Returns:
            vectors `[n, d]` and statistics `[n]` each, chain after chain; and how many chains they are from.
        """
        count = self.chains.count
        per = max(self.draws, -(-n // count))
        self.chains.extend(per)
        block = self.chains.ledger.read()
        chains = min(count, n)
        picked = torch.randperm(count)[:chains].sort().values
        each, more = divmod(n, chains)
        shift = float(torch.rand(()))  # which draws are left out is up to chance

        def gathered(values: Tensor) -> Tensor:
            parts = []
            for columns, k in ((picked[:more], each + 1), (picked[more:], each)):
                rows = ((torch.arange(k) + shift) * min(per, len(values)) / max(k, 1)).long()
                parts.append(values[rows][:, columns].transpose(0, 1).flatten(0, 1))
            return torch.cat(parts)

        return gathered(block.positions), {k: gathered(v) for k, v in block.stats.items()}, chains

    def heights(self, positions: Tensor) -> dict[str, Tensor]:
        """Log densities at positions `[n, d]`, on unconstrained vectors, finite latents summed out: `lp`."""
        if self.density.held or not self.density.size:
            return {}
        return {"lp": self.target_in_parts(positions)[0]}

    def target_in_parts(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The target at any number of positions, as many at a time as there are chains: what it is recorded for."""
        size, n = self.chains.count, len(positions)
        whole = torch.cat([positions, positions[:1].expand(-n % size, -1)])
        found = [self.functions.target(part.contiguous()) for part in whole.split(size)]
        return torch.cat([value for value, _ in found])[:n], torch.cat([slope for _, slope in found])[:n]

    def values(self, positions: Tensor) -> dict[str, Tensor]:
        """Values of all latents and deterministic sites at vectors `[n, d]`, in the types of the program."""
        found = self.read(positions)
        if self.density.finite:
            found |= self._choices(positions[:, : self.density.size])
        sites = self.structure.sites
        order = [*(s for s in self.structure.latents if s in found), *(s for s in found if s not in sites)]
        return {s: found[s].to(sites[s].dtype if s in sites else self.density.dtype) for s in order}

    def _choices(self, positions: Tensor) -> dict[str, Tensor]:
        positions = positions.to(self.density.dtype)
        if self.functions.way in ("recorded", "unrecorded"):
            parts = [self.density.choices(part) for part in positions.split(256)]
        else:
            parts = [{k: v.unsqueeze(0) for k, v in self.density.choice(one).items()} for one in positions]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


@dataclass
class Posterior:
    """What `pgen.fit` with backend "mcmc" answers with.

    Attributes:
        fitted: the problem that was fitted.
        sample_others: makes chains for other data, by the same options.
        evidence: estimates the log of the normaliser.
    """

    fitted: Sampled
    sample_others: Callable[[Problem, Structure], Sampled]
    evidence: Callable[[Sampled], Estimate]
    history: History = field(default_factory=History)
    parameters: None = None
    _other: Sampled | None = None

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Joint draws of every site, by running the program forward."""
        return draw(self.fitted.problem, self.fitted.structure, n)

    def posterior(self, problem: Problem, structure: Structure, n: int) -> Draws:
        """Draws of the chains; they are continued where more are asked for."""
        sampled = self._of(problem, structure)
        positions, stats, chains = sampled.positions(n)
        stats = {**stats, **sampled.heights(positions)}
        return Draws(sampled.values(positions), chains=chains, stats=stats)

    def everything(self) -> Draws:
        """All draws that there are."""
        return self.posterior(
            self.fitted.problem, self.fitted.structure, self.fitted.draws * self.fitted.chains.count
        )

    def resume(self, more: int) -> None:
        """Continue every chain by so many draws."""
        self.fitted.draws += more
        self.fitted.chains.extend(self.fitted.draws)
        self.history = self.fitted.chains.history()

    def log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        """Log of the evidence, estimated."""
        return self.evidence(self._of(problem, structure))

    def tensors(self) -> Mapping[str, Tensor]:
        """All draws, statistics, and the state of the chains."""
        found = self.fitted.chains.ledger.last()
        if found is None:
            return {}
        phase, done, state = found
        tensors = {f"state/{i}": leaf for i, leaf in enumerate(_leaves(state))}
        tensors["done"] = torch.tensor([phase == "draws", done, self.fitted.draws])
        if phase == "draws":
            block = self.fitted.chains.ledger.read()
            tensors |= {"positions": block.positions} | {f"stats/{k}": v for k, v in block.stats.items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved chains over."""
        if "done" not in tensors:
            return
        drawn, done, self.fitted.draws = (int(x) for x in tensors["done"])
        chains = self.fitted.chains
        with torch.random.fork_rng():
            template = chains.template()
        template = chains.sampler.ready(template) if drawn else template
        leaves = iter([tensors[f"state/{i}"] for i in range(sum(k.startswith("state/") for k in tensors))])
        state = plain(_refilled(template, leaves))
        ledger = Memory()
        if drawn:
            stats = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("stats/")}
            ledger.drawn(Block(tensors["positions"], stats), state)
        else:
            ledger.warmed(done, state)
        chains.ledger = ledger

    def _of(self, problem: Problem, structure: Structure) -> Sampled:
        if _same(problem, self.fitted.problem):
            return self.fitted
        if self._other is None or not _same(problem, self._other.problem):
            self._other = self.sample_others(problem, structure)
        return self._other


def _same(one: Problem, other: Problem) -> bool:
    if one is other:
        return True
    for a, b in ((one.inputs, other.inputs), (one.observations, other.observations)):
        if a.keys() != b.keys() or any(
            a[k].shape != b[k].shape or not torch.allclose(a[k], b[k], 0, 0, equal_nan=True) for k in a
        ):
            return False
    return True


def _leaves(state: Any) -> list[Tensor]:
    if isinstance(state, tuple):
        return [leaf for item in state for leaf in _leaves(item)]
    return [torch.as_tensor(state)]


def _refilled(template: Any, leaves: Any) -> Any:
    if not isinstance(template, tuple):
        leaf = next(leaves)
        return leaf if isinstance(template, Tensor) else type(template)(leaf.item())
    items = [_refilled(item, leaves) for item in template]
    return type(template)(*items) if hasattr(template, "_fields") else tuple(items)
