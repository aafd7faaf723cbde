"""Queries on chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pgen.backends.mcmc.groups import Groups, saved_groups
from pgen.capability import Estimate
from pgen.density import Density
from pgen.draws import Draws
from pgen.evaluation import Functions, in_parts
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
    chains: Groups
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
        block = self.chains.read()
        chains = min(count, n)
        # Which draws are left out is up to chance: that of the CPU, the same for every device.
        picked = torch.randperm(count, device="cpu")[:chains].sort().values.to(block.positions.device)
        each, more = divmod(n, chains)
        shift = float(torch.rand((), device="cpu"))

        def gathered(values: Tensor) -> Tensor:
            parts = []
            for columns, k in ((picked[:more], each + 1), (picked[more:], each)):
                steps = torch.arange(k, device=values.device) + shift
                rows = (steps * min(per, len(values)) / max(k, 1)).long()
                parts.append(values.transpose(0, 1)[columns[:, None], rows].flatten(0, 1))
            return torch.cat(parts) if more else parts[1]  # draws may be many: one copy is enough

        return gathered(block.positions), {k: gathered(v) for k, v in block.stats.items()}, chains

    def heights(self, positions: Tensor) -> dict[str, Tensor]:
        """Log densities at positions `[n, d]`, on unconstrained vectors, finite latents summed out: `lp`."""
        if self.density.held or not self.density.size:
            return {}
        heights = torch.cat([self.functions.target(part)[0] for part in self._in_parts(positions)])
        return {"lp": heights[: len(positions)] - self.density.volume(positions)}

    def target_in_parts(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The target at any number of positions, as many at a time as it is recorded for."""
        found = [self.functions.target(part) for part in self._in_parts(positions)]
        values, slopes = (torch.cat(leaves)[: len(positions)] for leaves in zip(*found, strict=True))
        return values, slopes

    def _in_parts(self, positions: Tensor) -> Sequence[Tensor]:
        return in_parts(positions, self.chains.width)

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
        sample_others: makes chains for other data, by the same options, in so many groups.
        evidence: estimates the log of the normaliser of a problem, from its chains if it needs them.
    """

    fitted: Sampled
    sample_others: Callable[[Problem, Structure, int | None], Sampled]
    evidence: Callable[[Problem, Structure, Callable[[], Sampled]], Estimate]
    history: History = field(default_factory=History)
    parameters: None = None
    groups: int | None = None  # of the chains that were loaded, whatever devices there are now
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
        """Log of the evidence, estimated; of each row, where rows share no latent."""
        return self.evidence(problem, structure, partial(self._of, problem, structure))

    def tensors(self) -> Mapping[str, Tensor]:
        """All draws, statistics, and the state of the chains."""
        saved = self.fitted.chains.saved()
        return {**saved, "draws": torch.tensor(self.fitted.draws, device="cpu")} if saved else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved chains over."""
        if "draws" not in tensors:
            return
        self.groups = saved_groups(tensors)
        if self.groups != len(self.fitted.chains.members):
            self.fitted = self.sample_others(self.fitted.problem, self.fitted.structure, self.groups)
        self.fitted.draws = int(tensors["draws"])
        self.fitted.chains.restore(tensors)

    def _of(self, problem: Problem, structure: Structure) -> Sampled:
        if same_data(problem, self.fitted.problem):
            return self.fitted
        if self._other is None or not same_data(problem, self._other.problem):
            self._other = self.sample_others(problem, structure, self.groups)
        return self._other


def same_data(one: Problem, other: Problem) -> bool:
    """Whether two problems hold the same inputs and observations."""
    if one is other:
        return True
    for a, b in ((one.inputs, other.inputs), (one.observations, other.observations)):
        if a.keys() != b.keys() or any(
            a[k].shape != b[k].shape or not torch.allclose(a[k], b[k], 0, 0, equal_nan=True) for k in a
        ):
            return False
    return True
