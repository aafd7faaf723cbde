"""How a program is fitted: steps, batches, optimiser, devices, files. The same for every backend."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pgen.errors import OptionError
from pgen.history import History
from pgen.holes import observed_by_name
from pgen.observers import Audience, Observer, ProgressBar
from pgen.problem import Data, Problem
from pgen.training.batches import Batches, split
from pgen.training.checkpoints import Checkpoints
from pgen.training.compilers import COMPILERS
from pgen.training.learner import Learner
from pgen.training.loop import Training
from pgen.training.optimizers import Average, Factory, Rate, Schedule, make_optimizer
from pgen.training.options import DETERMINING, EXPECTED, as_json, devices_of, shown
from pgen.training.players import Player, Step, move, require_trainable
from pgen.training.replays import Replays

__all__ = ["History", "Player", "Run", "Step"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, repr=False)
class Run:
    """How to fit. Every field has a default that suits most programs.

    Attributes:
        steps: optimiser steps. None: the backend's default.
        batch_size: rows per step; with no more rows than that, every step sees them all. None: what the
            DataLoader given as data says, else the backend's default.
        optimizer: "adam", "adamw", "sgd", "rmsprop", or a callable from a list of parameters to a
            `torch.optim.Optimizer`. Each player has one of its own.
        lr: learning rate, or a mapping from the names of players to theirs. None: 1e-3, or the callable's
            own.
        schedule: "cosine" or "linear" (down to 0), "exponential" (down to 1 percent), "constant", or a
            callable from step and number of steps to a factor of the learning rate.
        warmup_steps: steps over which the learning rate rises from 0.
        clip_norm: gradients with a larger norm, over all parameters of a player, are shortened to it. None:
            never.
        weight_decay: None means the optimiser's default.
        ema: fit the exponential moving average of the parameters: its decay (below 1) or its half-life in
            steps; or "power:0.1", one whose memory is that share of the training so far (Karras et al. 2024).
        validation: rows to look at but not to learn from: a fraction of the data, or data of their own.
        validate_every: steps between looks. None: twenty looks per run.
        patience: looks without a new lowest held-out loss before stopping early; the parameters of the lowest
            one are kept. None: look only.
        device: where to compute, for example "cuda". None: where the data is.
        precision: "float32" or "float64" (data, parameters and default dtype while fitting), or "bfloat16"
            (losses under autocast). None: as data and parameters are.
        checkpoint_every: steps between checkpoints in `directory`, from which the same fit goes on as if it
            had not been interrupted: to the bit, on the same machine with the same number of threads.
        directory: where checkpoints go.
        progress: whether to draw a progress bar, and one for queries that take long. None: if standard error is a terminal.
        observers: what else follows the run; see `pgen.observers`.
        seed: with the other options, determines every number.
        devices: several to compute on at the same time, for backends that can (`mcmc`: a group of chains on each): a
            number of CUDA devices, "auto" for all that there are, or a tuple of names, for example
            ("cuda:0", "cuda:1"), in which one may occur twice. The first of them is `device`.
        nodes: reserved; 1.
        strategy: reserved; None.
        compile: "auto": a loss and its gradient are recorded at the second step and then replayed, which gives the
            same numbers faster; a program that cannot be recorded is run as written, and the history says why.
            "inductor": on the CPU, recordings are compiled by torch's compiler before they are used, which takes 20
            to 60 seconds where it was not done before; what it leaves is kept on disk.
            "background": likewise, but training goes on by replays in the meantime, so that the last digits
            depend on the clock. False: always as written. None: "auto".

    Raises:
        OptionError: a field has a value that it cannot have.

    Example:
        >>> Run(steps=500, lr=3e-3, schedule="cosine", validation=0.1, patience=5).steps
        500
        >>> Run(optimizer="adan")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: Run(optimizer='adan'): expected 'adam', 'adamw', 'sgd', 'rmsprop' or a
        callable ...
    """

    steps: int | None = None
    batch_size: int | None = None
    optimizer: str | Factory = "adam"
    lr: float | Mapping[str, float] | None = None
    schedule: str | Schedule = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = 10.0
    weight_decay: float | None = None
    ema: float | str | None = None
    validation: float | Data | None = None
    validate_every: int | None = None
    patience: int | None = None
    device: str | torch.device | None = None
    precision: Literal["float32", "float64", "bfloat16"] | None = None
    checkpoint_every: int | None = None
    directory: str | Path | None = None
    progress: bool | None = None
    observers: tuple[Observer, ...] = ()
    seed: int = 0
    devices: int | str | Sequence[str | torch.device] = 1
    nodes: int = 1
    strategy: str | None = None
    compile: Literal["auto", "inductor", "background", False] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name, (fits, expected) in EXPECTED.items():
            value = getattr(self, name)
            if not fits(value):
                raise OptionError(f"Run({name}={shown(value)}): expected {expected}")
        if self.patience is not None and self.validation is None:
            raise OptionError(
                "Run(patience=...): expected validation too, for example Run(validation=0.1, patience=10)"
            )
        if self.checkpoint_every is not None and self.directory is None:
            raise OptionError(
                'Run(checkpoint_every=...): expected directory too, for example Run(directory="runs/a")'
            )
        if self.weight_decay is not None and not isinstance(self.optimizer, str):
            raise OptionError(
                "Run(weight_decay=...): expected None beside an optimizer of your own, which sets it itself"
            )
        object.__setattr__(self, "observers", tuple(self.observers))
        places = devices_of(self.devices)
        if places:
            if self.device is not None and torch.device(self.device) != torch.device(places[0]):
                raise OptionError(
                    f"Run(device={str(self.device)!r}, devices={shown(self.devices)}): expected devices alone, whose first "
                    f"one is {places[0]!r}"
                )
            object.__setattr__(self, "device", places[0])
        object.__setattr__(self, "devices", places if len(places) > 1 else 1)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Run:
        """A run from a mapping of options, as a command line or a file gives them.

        Raises:
            OptionError: an option that does not exist; the message names the nearest one.
        """
        known = [f.name for f in fields(Run)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise OptionError(f"Run has no option {name!r}; {hint}")
        return Run(**options)

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the options that differ from the defaults.

        >>> Run(steps=10, lr=0.1).given
        ('steps', 'lr')
        """
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not f.default)

    def __repr__(self) -> str:
        """The call that makes it: only what differs from the defaults."""
        return f"Run({', '.join(f'{name}={shown(getattr(self, name))}' for name in self.given)})"

    def described(self) -> dict[str, Any]:
        """The options as JSON values: what is not a number or a string is named, not stored."""
        return {f.name: as_json(getattr(self, f.name)) for f in fields(self)}

    def optimize(
        self,
        players: Mapping[str, Player],
        problem: Problem,
        *,
        buffers: MutableMapping[str, Tensor] | None = None,
        default_steps: int = 2000,
        default_batch: int = 128,
        name: str = "training",
    ) -> History:
        """Let the players optimise, in order, at every step, on batches of the problem's rows.

        Their parameters and the buffers are changed in place: to the result if this returns, to the last good
        state if it raises `Diverged`. Ctrl-C stops early and keeps what was learned.

        Args:
            players: by name. The first one leads: its loss is the one that is validated.
            problem: the whole, whose rows are drawn from.
            buffers: tensors that the losses change in place.
            default_steps: steps, where the run leaves them open.
            default_batch: rows per step, likewise.
            name: of this training among those of one fit; its checkpoints are in a folder of that name.

        Raises:
            OptionError: an option that does not go with this program or machine.
            ProgramError: parameters that cannot be trained.
            Diverged: numbers that are not finite, again after three roll-backs.
            CheckpointError: the directory holds damaged checkpoints, or those of another run.
        """
        players = {who: player for who, player in players.items() if player.parameters}
        if not players:
            return History(seed=self.seed)
        steps = default_steps if self.steps is None else self.steps
        size = self.batch_size or problem.suggested_batch or default_batch
        buffers = {} if buffers is None else buffers
        require_trainable(players)
        self._require_rates(players)
        device = None if self.device is None else torch.device(self.device)
        dtype = DTYPES.get(self.precision or "")
        for group in (*(player.parameters for player in players.values()), buffers):
            move(group, device, dtype)
        place = next(iter(next(iter(players.values())).parameters.values())).device
        batches, held_out = self._batches(Batches(problem, size, self.seed, device=device, dtype=dtype))
        tensors = [tensor for player in players.values() for tensor in player.parameters.values()]
        learners = [
            self._learner(who, player, f"{who}." if len(players) > 1 else "", tensors, buffers, batches.fixed)
            for who, player in players.items()
        ]
        training = Training(
            learners=learners,
            batches=batches,
            steps=steps,
            seed=self.seed,
            rate=Rate(self.schedule, steps, self.warmup_steps),
            audience=Audience(self.watchers()),
            buffers=buffers,
            devices=[place],
            context=self._context(place),
            average=None if self.ema is None else Average(tensors, Average.decay_of(self.ema)),
            held_out=held_out,
            validate_every=self.validate_every or max(1, steps // 20),
            patience=self.patience,
            checkpoints=self._checkpoints(name, batches, steps),
        )
        with _default_dtype(dtype):
            return training.run(self)

    @property
    def places(self) -> tuple[torch.device, ...]:
        """The devices to compute on at the same time; none where it is one, which is `device` or that of the data.

        >>> Run(devices=("cpu", "cpu")).places, Run().places
        ((device(type='cpu'), device(type='cpu')), ())
        """
        return tuple(map(torch.device, devices_of(self.devices)))

    def watchers(self) -> tuple[Observer, ...]:
        """All that follows the run: its observers and, where it is to be drawn, a progress bar."""
        return (*self.observers, ProgressBar()) if self._shows_progress() else self.observers

    def _require_rates(self, players: Mapping[str, Player]) -> None:
        strangers = [name for name in self.lr if name not in players] if isinstance(self.lr, Mapping) else []
        if strangers:
            who = ", ".join(map(repr, players))
            raise OptionError(
                f"Run(lr={self.lr!r}): there is no player {strangers[0]!r}; expected names among {who}"
            )

    def _learner(
        self,
        name: str,
        player: Player,
        prefix: str,
        tensors: list[Tensor],
        buffers: MutableMapping[str, Tensor],
        fixed: bool,
    ) -> Learner:
        lr = self.lr.get(name) if isinstance(self.lr, Mapping) else self.lr
        optimizer = make_optimizer(self.optimizer, list(player.parameters.values()), lr, self.weight_decay)
        replays = self.replays(name, player, tensors, buffers, fixed=fixed)
        return Learner(name, player, optimizer, self.clip_norm, prefix, replays)

    def replays(
        self,
        name: str,
        player: Player,
        tensors: Sequence[Tensor],
        buffers: MutableMapping[str, Tensor],
        *,
        fixed: bool = False,
        wait: int = 0,
    ) -> Replays | None:
        """What evaluates a player by replays, as `compile` says; None: it is always run as written.

        Args:
            name: of the player.
            player: its parameters and loss.
            tensors: the parameters of all players.
            buffers: tensors that losses change.
            fixed: whether all batches are the same.
            wait: evaluations before it is worth it.
        """
        if self.compile is False:
            return None
        compiler = COMPILERS[self.compile or "auto"]
        return Replays(name, player, tensors, buffers, fixed=fixed, compiler=compiler, wait=wait)

    def _batches(self, every: Batches) -> tuple[Batches, Batches | None]:
        """Rows to learn from and rows held out."""
        given, count = self.validation, every.count
        if given is None:
            return every, None
        if not isinstance(given, float):
            return every, replace(
                every, problem=observed_by_name(every.problem.with_data(given)), total=count
            )
        if count is None or count < 2:
            found = "no rows" if count is None else "one row"
            raise OptionError(
                f"Run(validation={given}): the data has {found}, so none can be held out; expected data of "
                "their own, for example Run(validation={'x': tensor})"
            )
        train, held = split(count, given, self.seed)
        train_rows = train.numel()
        return replace(every, rows=train, total=train_rows), replace(every, rows=held, total=train_rows)

    def _checkpoints(self, name: str, batches: Batches, steps: int) -> Checkpoints | None:
        if self.checkpoint_every is None or self.directory is None:
            return None
        terms = {key: value for key, value in self.described().items() if key in DETERMINING}
        terms |= {"batch_size": batches.size, "rows": batches.count}
        if self.schedule != "constant":
            terms["steps"] = steps
        return Checkpoints(Path(self.directory) / "checkpoints" / name, terms, self.checkpoint_every)

    def _context(self, place: torch.device) -> Callable[[], AbstractContextManager[Any]]:
        bfloat16 = self.precision == "bfloat16"
        return partial(torch.autocast, place.type, torch.bfloat16) if bfloat16 else nullcontext

    def _shows_progress(self) -> bool:
        return sys.stderr.isatty() if self.progress is None else self.progress


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)
