"""Groups of chains, one to a device, that together sample one posterior.

Each group learns its own step size and scale, from its own chains, and has a seed of its own: what it draws is a
function of that seed and of how many chains it has, whether the others run, and where, or not.

torch draws from one generator to a device. So groups on one device take turns, a block each, and groups on different
devices run side by side, a thread to a device, each seeding and using that device's generator alone. Recordings are
made one at a time; replays of them need no such care.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pgen.algorithms.record.verify import confined
from pgen.backends.mcmc.chains import Chains
from pgen.backends.mcmc.ledger import Block, abreast
from pgen.errors import CheckpointError, OptionError
from pgen.history import History
from pgen.problem import Problem
from pgen.threads import Work, threads_restored, use_threads
from pgen.training.batches import derive, generators


@dataclass
class Groups:
    """All chains of a posterior: groups of equal size, in order.

    Attributes:
        members: the groups.
        aside: whether groups on different devices can run at the same time; not where the program itself is run for
            every gradient, for Pyro's handlers belong to the process.
    """

    members: list[Chains]
    aside: bool = True

    @property
    def count(self) -> int:
        """Chains in all."""
        return sum(group.count for group in self.members)

    @property
    def width(self) -> int:
        """Chains of one group: as many vectors as its functions are recorded for."""
        return self.members[0].count

    @property
    def warmup(self) -> int:
        """Iterations of warm-up, as far as is known beforehand."""
        return self.members[0].sampler.warmup

    def extend(self, draws: int) -> None:
        """Go on until every chain has at least so many draws; Ctrl-C keeps those that are there."""
        behind = [group for group in self.members if not group.has(draws)]
        if not behind:
            return
        with threads_restored() as available:
            with Work() as work:
                begun = [group.template() for group in behind]
            use_threads(work.threads(available))
            try:
                self._extend(behind, begun, draws)
            except KeyboardInterrupt:
                if not all(group.has(1) for group in self.members):
                    raise

    def _extend(self, groups: list[Chains], begun: list[Any], draws: int) -> None:
        lanes: dict[torch.device, list[tuple[Chains, Any]]] = {}
        for group, state in zip(groups, begun, strict=True):
            lanes.setdefault(self._lane(group), []).append((group, state))
        if len(lanes) == 1:
            in_turn([group.advance(state, draws) for group, state in zip(groups, begun, strict=True)])
            return
        side_by_side(
            {
                device: [group.advance(state, draws, seeder(device)) for group, state in lane]
                for device, lane in lanes.items()
            }
        )

    def read(self) -> Block:
        """All draws so far, the chains of all groups side by side, on the first one's device."""
        first = self.members[0].device
        return abreast([group.ledger.read().to(first) for group in self.members])

    def history(self) -> History:
        """Acceptance and the like by draw, means over the chains."""
        block = self.read()
        means = {name: series.double().mean(-1).cpu() for name, series in block.stats.items()}
        spent = {phase: self._seconds(phase) for phase in ("warmup", "draws")}
        total = sum(spent.values())
        times = torch.linspace(spent["warmup"], total, len(block) + 1, dtype=torch.float64, device="cpu")[1:]
        samplers = {id(group.sampler): group.sampler for group in self.members}.values()
        moved = sum(getattr(sampler, "moved", 0) for sampler in samplers)
        said = (
            f"{moved} of {self.count} chains had warmed up in a place of hardly any mass, and began anew "
            "beside others"
        )
        return History(
            metrics={**means, "seconds": times},
            steps=len(block),
            seconds=total,
            seed=self.members[0].seed,
            warnings=(said,) if moved else (),
        )

    def _seconds(self, phase: str) -> float:
        """Of the clock: groups on one device add up, devices do not."""
        spent: dict[torch.device, float] = {}
        for group in self.members:
            lane = self._lane(group)
            spent[lane] = spent.get(lane, 0.0) + group.seconds[phase]
        return max(spent.values())

    def _lane(self, group: Chains) -> torch.device:
        """Groups of one lane take turns: those that draw from one generator."""
        if not self.aside or group.device.type != "cuda":
            return torch.device("cpu")
        return torch.device("cuda", _index(group.device))

    def saved(self) -> dict[str, Tensor]:
        """All draws, statistics, and the states of the chains, as tensors by name."""
        return {
            f"group/{g}/{name}": tensor
            for g, group in enumerate(self.members)
            for name, tensor in group.saved().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what as many groups have `saved`."""
        for g, group in enumerate(self.members):
            prefix = f"group/{g}/"
            group.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def saved_groups(tensors: Mapping[str, Tensor]) -> int:
    """How many groups the tensors were saved by."""
    return sum(name.startswith("group/") and name.endswith("/done") for name in tensors)


def seed_of(seed: int, group: int) -> int:
    """The seed of a group: the first has that of the run, as chains that are one group have."""
    return derive(seed, "group", group) if group else seed


def folder_of(directory: Path, group: int, groups: int) -> Path:
    """Where the draws of a group are kept.

    Raises:
        CheckpointError: the directory holds chains that were divided in another way.
    """
    chains = directory / "chains"
    found = {path.name.partition("-")[0] for path in chains.iterdir()} if chains.is_dir() else set()
    if found & ({"group"} if groups == 1 else {"warmup", "draws"}):
        raise CheckpointError(
            f"{chains} holds chains in {'one group' if groups > 1 else 'several groups'}, and here there "
            f"{f'are {groups}' if groups > 1 else 'is one'}; give as many devices as they began with (one may be "
            "named several times), or another directory"
        )
    return chains if groups == 1 else chains / f"group-{group}"


def on(problem: Problem, device: torch.device) -> Problem:
    """The problem with its data, its arguments and the tensors of its module on a device.

    Raises:
        OptionError: the program takes no tensors, so that nothing says to it where to compute.
    """

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    moved = replace(
        problem.to(device), args=tree_map(move, problem.args), kwargs=tree_map(move, dict(problem.kwargs))
    )
    program = problem.program
    if isinstance(program, nn.Module):
        tensors = (*program.parameters(), *program.buffers())
        if any(not same_device(t.device, device) for t in tensors):
            moved = replace(moved, program=copy.deepcopy(program).to(device))
    if not same_device(moved.device, device):
        raise OptionError(
            f"Run(devices=...): the program is given no data, so it computes on the {moved.device.type} whatever device "
            f"is asked for ({device}); give its data as data, or leave devices out"
        )
    return moved


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device: `cuda` is the current one."""
    return one.type == other.type and (
        one == other or _index(one) == _index(other) or one.type in ("cpu", "mps")
    )


def _index(device: torch.device) -> int:
    if device.index is not None or device.type != "cuda":
        return device.index or 0
    return torch.cuda.current_device()


def seeder(device: torch.device) -> Callable[[int], object]:
    """Seeds the generator of one device, and no other."""
    return generators([device])[-1].manual_seed


_OVER = object()


def in_turn(moving: Sequence[Iterator[None]], stopped: Callable[[], bool] = lambda: False) -> None:
    """A block of each, over and over, until all are done or it is stopped; what is begun is put away at the end."""
    left = list(moving)
    try:
        while left and not stopped():
            left = [each for each in left if next(each, _OVER) is not _OVER]
    finally:
        for each in moving:
            close: Callable[[], None] = getattr(each, "close", lambda: None)
            close()


def side_by_side(lanes: Mapping[torch.device, Sequence[Iterator[None]]]) -> None:
    """The same for every device at once, in a thread each. When one fails, or on Ctrl-C, all stop after their block."""
    stop, grad = threading.Event(), torch.is_grad_enabled()

    def run(device: torch.device, moving: Sequence[Iterator[None]]) -> None:
        current: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.set_grad_enabled(grad), current, confined(device):
            in_turn(moving, stop.is_set)

    with ThreadPoolExecutor(len(lanes), "chains") as pool:
        futures = [pool.submit(run, device, moving) for device, moving in lanes.items()]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in futures:
            future.result()
