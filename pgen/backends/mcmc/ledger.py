"""What chains have given so far: blocks of draws, in memory or as shards on disk, and the state after the last one.

A shard is a folder of its own, written whole (see `pgen.store`): draws of one stretch of iterations, what is known
about them, and the state of the chains at its end. A process that is killed leaves whole shards; the next one goes on
from the last of them, and as each block has random numbers of its own, its draws are those of a process that never died.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pgen import store
from pgen.errors import CheckpointError
from pgen.problem import Problem
from pgen.training.checkpoints import pack, unpack

_NAME = re.compile(r"(warmup|draws)-(\d{8})")


def digest(problem: Problem) -> str:
    """A name for the data and arguments of a problem: the same for the same, another for others."""
    found = hashlib.blake2b(digest_size=16)
    groups = {"inputs": problem.inputs, "observations": problem.observations, "kwargs": problem.kwargs}
    named = [(f"{group}.{k}", v) for group, some in groups.items() for k, v in sorted(some.items())]
    for name, value in [*named, *((f"args.{i}", v) for i, v in enumerate(problem.args))]:
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str)):
            found.update(repr(value).encode())
        else:  # objects are told apart by their kind only
            found.update(type(value).__qualname__.encode())
    return found.hexdigest()


def plain(state: Any) -> Any:
    """Nested state as tuples and tensors: what a file can hold."""
    return tuple(plain(item) for item in state) if isinstance(state, tuple) else state


def laid_out(state: Any) -> Any:
    """The same state, its tensors laid out in memory as a file gives them back.

    Products of matrices round otherwise where a factor is laid out by columns: without this, chains that were put away
    would go on by other digits than chains that were not.
    """
    if isinstance(state, Tensor):
        return state.contiguous()
    if not isinstance(state, tuple):
        return state
    items = [laid_out(item) for item in state]
    return type(state)(*items) if hasattr(state, "_fields") else tuple(items)


def typed(state: Any, template: Any) -> Any:
    """The inverse of `plain`, by a state of the same kind, on whose devices it is put."""
    if not isinstance(template, tuple):
        return placed(state, template)
    if not isinstance(state, tuple) or len(state) != len(template):
        raise CheckpointError(
            "the saved state is not that of this kernel; load with the backend that was used"
        )
    items = [typed(item, like) for item, like in zip(state, template, strict=True)]
    return type(template)(*items) if hasattr(template, "_fields") else tuple(items)


def placed(leaf: Any, like: Any) -> Any:
    """A saved leaf on the device of another, whose type it has to have."""
    if not isinstance(leaf, Tensor) or not isinstance(like, Tensor):
        return leaf
    if leaf.dtype != like.dtype:
        raise CheckpointError(
            f"the saved chains are in {leaf.dtype}, and would go on in {like.dtype}; give the precision and the kind of "
            "device that they began with"
        )
    return leaf.to(like.device)


def leaves(state: Any) -> list[Tensor]:
    """The tensors of a nested state, in order."""
    if isinstance(state, tuple):
        return [leaf for item in state for leaf in leaves(item)]
    return [state if isinstance(state, Tensor) else torch.tensor(state, device="cpu")]


def refilled(template: Any, parts: Iterator[Tensor]) -> Any:
    """A state of the same kind as another, made of such tensors."""
    if not isinstance(template, tuple):
        leaf = next(parts)
        return placed(leaf, template) if isinstance(template, Tensor) else type(template)(leaf.item())
    items = [refilled(item, parts) for item in template]
    return type(template)(*items) if hasattr(template, "_fields") else tuple(items)


@dataclass(frozen=True)
class Block:
    """Some iterations of all chains: positions `[n, C, d]`, and statistics `[n, C]` each."""

    positions: Tensor
    stats: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Iterations."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> Block:
        """The same on a device."""
        return Block(self.positions.to(device), {name: v.to(device) for name, v in self.stats.items()})


class Ledger(Protocol):
    """Keeps blocks of draws in order, and the newest state."""

    def warmed(self, iterations: int, state: Any) -> None:
        """Note the state after so many iterations of warm-up."""
        ...

    def drawn(self, block: Block, state: Any) -> None:
        """Append draws, and note the state after them."""
        ...

    def last(self) -> tuple[str, int, Any] | None:
        """The phase ("warmup" or "draws"), how many iterations of it are done, and the state then."""
        ...

    def read(self) -> Block:
        """All draws so far."""
        ...


@dataclass
class Memory:
    """Draws in memory."""

    blocks: list[Block] = field(default_factory=list)
    newest: tuple[str, int, Any] | None = None

    def warmed(self, iterations: int, state: Any) -> None:
        """Note the state."""
        self.newest = ("warmup", iterations, state)

    def drawn(self, block: Block, state: Any) -> None:
        """Append."""
        self.blocks.append(block)
        self.newest = ("draws", sum(map(len, self.blocks)), state)

    def last(self) -> tuple[str, int, Any] | None:
        """The newest state."""
        return self.newest

    def read(self) -> Block:
        """All blocks as one."""
        if len(self.blocks) > 1:
            self.blocks = [joined(self.blocks)]
        return self.blocks[0]


def joined(blocks: list[Block]) -> Block:
    """Blocks one after the other."""
    return Block(
        torch.cat([b.positions for b in blocks]),
        {name: torch.cat([b.stats[name] for b in blocks]) for name in blocks[0].stats},
    )


def abreast(blocks: list[Block]) -> Block:
    """The chains of blocks side by side, as many iterations of each as all have."""
    if len(blocks) == 1:
        return blocks[0]
    n = min(map(len, blocks))
    return Block(
        torch.cat([b.positions[:n] for b in blocks], 1),
        {name: torch.cat([b.stats[name][:n] for b in blocks], 1) for name in blocks[0].stats},
    )


@dataclass
class Shards:
    """Draws in a folder, a shard for every so many iterations; the computer's own memory holds one shard.

    Attributes:
        directory: the folder.
        terms: what determines the draws; shards that were written under others are refused.
        every: draws of a chain in a shard, at least.
    """

    directory: Path
    terms: Mapping[str, Any]
    every: int
    pending: list[Block] = field(default_factory=list)

    def warmed(self, iterations: int, state: Any) -> None:
        """Write the state, in the place of the one before."""
        self._write("warmup", iterations, state, {})
        for path in self._found("warmup")[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def drawn(self, block: Block, state: Any) -> None:
        """Append; write a shard where enough have come together."""
        self.pending.append(block.to("cpu"))
        if sum(map(len, self.pending)) >= self.every:
            self.flush(state)

    def flush(self, state: Any) -> None:
        """Write what has not been written."""
        if not self.pending:
            return
        block = joined(self.pending)
        self.pending = list[Block]()
        tensors = {"positions": block.positions} | {f"stats/{k}": v for k, v in block.stats.items()}
        self._write("draws", self._done() + len(block), state, tensors)

    def last(self) -> tuple[str, int, Any] | None:
        """Phase, iterations and state of the newest shard."""
        found = self._found("draws") or self._found("warmup")
        if not found:
            return None
        tensors, metadata = self._load(found[-1])
        return metadata["phase"], int(metadata["done"]), unpack(metadata["state"], tensors, found[-1])

    def read(self) -> Block:
        """All draws, read from disk."""
        blocks: list[Block] = []
        done = 0
        for path in self._found("draws"):
            tensors, metadata = self._load(path)
            stats = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("stats/")}
            blocks.append(Block(tensors["positions"], stats))
            done += len(blocks[-1])
            if done != metadata["done"]:
                raise CheckpointError(
                    f"{path}: a shard before it is missing (it ends at draw {metadata['done']}, and {done} are there); "
                    "put it back, or begin anew in another folder"
                )
        return joined([*blocks, *self.pending])

    def _done(self) -> int:
        found = self._found("draws")
        return int(found[-1].name.rpartition("-")[2]) if found else 0

    def _write(self, phase: str, done: int, state: Any, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        packed = pack(state, "state", tensors)
        described = {"terms": dict(self.terms), "phase": phase, "done": done, "state": packed}
        store.save(self.directory / f"{phase}-{done:08d}", tensors, described)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, metadata = store.load(path)
        if metadata.get("terms") != dict(self.terms):
            raise CheckpointError(
                f"{path} holds chains of another program, data, backend or seed ({metadata.get('terms')}), not of this one "
                f"({dict(self.terms)}); give another directory"
            )
        return tensors, metadata

    def _found(self, phase: str) -> list[Path]:
        if not self.directory.is_dir():
            return []
        named = (p for p in self.directory.iterdir() if (m := _NAME.fullmatch(p.name)) and m[1] == phase)
        return sorted(named)
