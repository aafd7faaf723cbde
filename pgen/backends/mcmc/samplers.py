"""Kernels by name, each with its way of warming up, as chains run them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.adaptation.chees import ChEESWarmup
from pgen.algorithms.adaptation.meads import MEADSWarmup
from pgen.algorithms.adaptation.warmup import Adapted, Metric, Warmup
from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning, untuned
from pgen.algorithms.kernels.chees import ChEES, Stride
from pgen.algorithms.kernels.foreign import Foreign
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.iterate import Step, Wrap, iterate, unwrapped
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.algorithms.kernels.meads import MEADS
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.kernels.stochastic import SGHMC, SGLD
from pgen.algorithms.kernels.tree import Leaf
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.algorithms.record import record
from pgen.backends.mcmc.astray import hopeless
from pgen.backends.mcmc.ledger import Block

_FEW = 32  # chains: below, warm-up has less to pool and takes longer
_POOLED_BLOCK = 25
_TRIAL = 30  # iterations
_DIVERGENT = 0.0  # of trajectories: beyond, steps are too long
_CAREFUL = 0.98  # acceptance
_SHORTER = 0.5  # part of the usual warm-up, since the scale is known
_HOT = (Leaf, Stride, Step)
_STATISTICS = {
    "accept": "acceptance_rate",
    "energy": "energy",
    "diverging": "diverging",
    "evaluations": "n_steps",
    "depth": "tree_depth",
    "step_size": "step_size",
}


class Moving(NamedTuple):
    """State of a kernel, and what it is tuned to."""

    kernel: Any
    tuning: Any


@dataclass
class Windowed:
    """A kernel whose step size and scale are learnt in windows.

    Attributes:
        kernel: any with `init` and `step`.
        target: the log density and its gradient.
        adaptation: its warm-up.
        wrap: makes straight-line functions fast.
        thin: iterations per draw.
    """

    kernel: Kernel
    target: LogDensity
    adaptation: Warmup
    wrap: Wrap
    thin: int = 1

    @property
    def warmup(self) -> int:
        """Iterations of warm-up."""
        return sum(block.length for block in self.adaptation.plan)

    def begin(self, position: Tensor, tuning: Tuning | None = None) -> Adapted:
        """The state before warm-up, at positions `[C, d]`; from another tuning, if there is one."""
        return self.adaptation.init(position, self.target, tuning)

    def warm(self, state: Adapted) -> tuple[Adapted, int]:
        """A block of the warm-up, and how many iterations it took."""
        length = self.adaptation.plan[state.block].length
        return self.adaptation.advance(state, self.target, 1, self.wrap), length

    def warmed(self, state: Adapted) -> bool:
        """Whether the plan is done."""
        return self.adaptation.finished(state)

    def ready(self, state: Adapted) -> Moving:
        """The state before the first draw."""
        return Moving(state.state, state.tuning)

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """So many draws of each chain."""
        inner, positions, info = iterate(
            self.kernel, state.kernel, state.tuning, self.target, draws * self.thin, self.wrap
        )
        block = thinned(positions, info, self.thin)
        if isinstance(self.kernel, NUTS):
            full = block.stats["tree_depth"] >= self.kernel.max_depth
            block = Block(block.positions, {**block.stats, "reached_max_treedepth": full})
        return Moving(inner, state.tuning), block


class Begun(NamedTuple):
    """A kernel with its tuning, and how many iterations were left out."""

    moving: Moving
    done: Tensor


@dataclass
class Fixed:
    """A kernel with the tuning that it is given: nothing is learnt, the first iterations are only left out."""

    kernel: Kernel
    target: LogDensity
    warmup: int
    wrap: Wrap
    tune: Callable[[Tensor], Tuning] = untuned
    thin: int = 1

    def begin(self, position: Tensor) -> Begun:
        """The state at positions `[C, d]`."""
        moving = Moving(self.kernel.init(position, self.target), self.tune(position))
        return Begun(moving, torch.tensor(0, device="cpu"))

    def warm(self, state: Begun) -> tuple[Begun, int]:
        """All iterations that are left out."""
        moving, _ = self.run(state.moving, self.warmup)
        return Begun(moving, torch.tensor(self.warmup, device="cpu")), self.warmup

    def warmed(self, state: Begun) -> bool:
        """Whether they are."""
        return int(state.done) >= self.warmup

    def ready(self, state: Begun) -> Moving:
        """The state before the first draw."""
        return state.moving

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """So many draws of each chain."""
        inner, positions, info = iterate(
            self.kernel, state.kernel, state.tuning, self.target, draws * self.thin, self.wrap
        )
        return Moving(inner, state.tuning), thinned(positions, info, self.thin)


@dataclass
class Pooled:
    """A kernel with a warm-up of its own: ChEES and MEADS learn from all chains together."""

    kernel: Kernel
    target: LogDensity
    adaptation: Any
    wrap: Wrap
    thin: int = 1

    @property
    def warmup(self) -> int:
        """Iterations of warm-up."""
        return self.adaptation.iterations

    def begin(self, position: Tensor, tuning: Any = None) -> Any:
        """The state before warm-up, at positions `[C, d]`; from the scale of another tuning, if there is one."""
        return self.adaptation.begin(position, self.target, None if tuning is None else tuning.scale)

    def warm(self, state: Any) -> tuple[Any, int]:
        """A block of the warm-up, and how many iterations it took."""
        return self.adaptation.advance(state, self.target, _POOLED_BLOCK, self.wrap), _POOLED_BLOCK

    def warmed(self, state: Any) -> bool:
        """Whether all iterations are done."""
        return int(state.iteration) >= self.warmup

    def ready(self, state: Any) -> Moving:
        """The state before the first draw."""
        return Moving(*self.adaptation.finish(state))

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """So many draws of each chain."""
        inner, positions, info = iterate(
            self.kernel, state.kernel, state.tuning, self.target, draws * self.thin, self.wrap
        )
        return Moving(inner, state.tuning), thinned(positions, info, self.thin)


class Staged(NamedTuple):
    """Which warm-up is under way (0 the usual, 1 the careful, 2 none, 3 the usual once more), and its state."""

    stage: int
    state: Any


@dataclass
class Cautious:
    """A sampler that looks at what its warm-up led to, and warms up once more where that is no good.

    Chains that ended in a place whose density is beyond doubt too low to matter, a mode of weight zero, begin anew beside
    others. And where trajectories diverge, steps were too long for a part of the posterior, which is then seldom
    entered or left: a second warm-up aims at a higher acceptance. Most posteriors need neither, and are sampled
    faster by longer steps.
    """

    usual: Any
    careful: Any
    target: LogDensity
    moved: int = 0  # chains that began anew

    @property
    def warmup(self) -> int:
        """Iterations of the usual warm-up and the trial."""
        return self.usual.warmup + _TRIAL

    def begin(self, position: Tensor) -> Staged:
        """The state before warm-up, at positions `[C, d]`."""
        return Staged(0, self.usual.begin(position))

    def warm(self, state: Staged) -> tuple[Staged, int]:
        """A block of the warm-up; at the end of the usual one, a trial."""
        sampler = self.careful if state.stage == 1 else self.usual
        if not sampler.warmed(state.state):
            inner, iterations = sampler.warm(state.state)
            return Staged(state.stage, inner), iterations
        moving = self.usual.ready(state.state)
        _, block = self.usual.run(moving, _TRIAL)
        last = block.positions[-1]
        if state.stage == 0:
            astray = hopeless(self.target, block.positions)
            if bool(astray.any()):
                self.moved += int(astray.sum())
                others = (~astray).nonzero().squeeze(-1)
                beside = others[torch.randint(len(others), astray.shape, device=last.device)]
                moved = torch.where(astray[:, None], last[beside], last)
                return Staged(3, self.usual.begin(moved)), _TRIAL
        if float(block.stats["diverging"].double().mean()) > _DIVERGENT:
            return Staged(1, self.careful.begin(last, moving.tuning)), _TRIAL
        return Staged(2, state.state), _TRIAL

    def warmed(self, state: Staged) -> bool:
        """Whether the trial was passed, or the careful warm-up is over."""
        return state.stage == 2 or (state.stage == 1 and self.careful.warmed(state.state))

    def ready(self, state: Staged) -> Any:
        """The state before the first draw."""
        return (self.careful if state.stage == 1 else self.usual).ready(state.state)

    def run(self, state: Any, draws: int) -> tuple[Any, Block]:
        """So many draws of each chain."""
        return self.usual.run(state, draws)


@dataclass
class Idle:
    """Nothing is left to move: every latent is drawn exactly, given no other."""

    chains: int
    warmup: int = 0

    def begin(self, position: Tensor) -> Moving:
        """Where they are, in no dimensions."""
        return Moving(position, ())

    def warm(self, state: Moving) -> tuple[Moving, int]:
        """Nothing to learn."""
        return state, 0

    def warmed(self, state: Moving) -> bool:
        """Always."""
        return True

    def ready(self, state: Moving) -> Moving:
        """The same state."""
        return state

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """Vectors of no length."""
        one = state.kernel.new_ones(draws, self.chains)
        return state, Block(
            state.kernel.expand(draws, -1, -1), {"acceptance_rate": one, "diverging": one > 1}
        )


def thinned(positions: Tensor, info: Any, thin: int) -> Block:
    """Draws and what the kernel reports about them, by the names that ArviZ knows."""
    last = slice(thin - 1, None, thin)
    stats = {name: getattr(info, own)[last] for own, name in _STATISTICS.items() if own in info._fields}
    return Block(positions[last], stats)


UNADJUSTED: dict[str, Kernel] = {"ula": ULA(), "sgld": SGLD(), "sghmc": SGHMC()}
KERNELS = ("nuts", "hmc", "chees", "meads", "mala", "random-walk", *UNADJUSTED, "tempering", "smc")


@dataclass(frozen=True)
class Options:
    """What the backend's options say about a sampler.

    Attributes:
        kernel: a name, or an object.
        chains: how many there will be.
        warmup: iterations; None: as many as the kernel needs.
        target_accept: None: what suits the kernel.
        metric: see `Warmup`.
        max_depth: of trees.
        step_size: of kernels that do not adapt it.
        thin: iterations per draw.
        recorded: whether functions of the target can be recorded.
        compile: of the run: what is made of recordings.
    """

    kernel: Any
    chains: int
    warmup: int | None
    target_accept: float | None
    metric: Metric
    max_depth: int
    step_size: float
    thin: int
    recorded: bool
    compile: Any = None

    @property
    def iterations(self) -> int:
        """Of the warm-up: what was asked for, or what has served the kernel well."""
        if self.warmup is not None:
            return self.warmup
        if self.chains < _FEW:
            return 800
        return {"meads": 1000}.get(self.kernel if isinstance(self.kernel, str) else "", 200)

    @functools.cached_property
    def wrap(self) -> Wrap:
        """What makes straight-line functions fast, remembering what it gave: whoever shares it shares recordings."""
        if not self.recorded:
            return unwrapped
        compiled = self.compile if self.compile in ("inductor", "background") else None

        @functools.cache
        def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
            # What is called once for each gradient is worth compiling; the rest is called seldom.
            return record(fn, compile=compiled if isinstance(fn, _HOT) else None)

        return wrap


def sampler_of(options: Options, target: LogDensity) -> Any:
    """The sampler that the options describe."""
    if options.target_accept is None and options.kernel in ("nuts", "hmc", "chees"):
        careful = replace(options, target_accept=_CAREFUL, warmup=round(_SHORTER * options.iterations))
        usual = _sampler_of(options, target, options.wrap)
        return Cautious(usual, _sampler_of(careful, target, options.wrap), target)
    usual = _sampler_of(options, target, options.wrap)
    return Cautious(usual, usual, target) if options.kernel == "meads" else usual


def _sampler_of(options: Options, target: LogDensity, wrap: Wrap) -> Any:
    name, thin = options.kernel, options.thin
    warmup = options.iterations
    dense = options.metric != "diagonal"
    if name == "chees" or isinstance(name, ChEES):
        chees = name if isinstance(name, ChEES) else ChEES()
        learns = ChEESWarmup(chees, max(1, warmup), options.target_accept or 0.8, dense=dense)
        return Pooled(chees, target, learns, wrap, thin)
    if name == "meads" or isinstance(name, MEADS):
        meads = name if isinstance(name, MEADS) else MEADS(thin=5)
        return Pooled(meads, target, MEADSWarmup(max(1, warmup), dense=dense), wrap, thin)
    kernel = UNADJUSTED[name] if isinstance(name, str) and name in UNADJUSTED else name
    if isinstance(kernel, (ULA, SGLD, SGHMC)):
        tune = functools.partial(untuned, step_size=options.step_size)
        return Fixed(kernel, target, warmup, wrap, tune, thin)
    tuned: dict[str, tuple[Any, float]] = {
        "nuts": (NUTS(max_depth=options.max_depth), 0.8),
        "hmc": (HMC(), 0.651),
        "mala": (MALA(), 0.574),
        "random-walk": (RandomWalk(), 0.234),
    }
    if isinstance(name, str):
        kernel, accept = tuned[name]
    elif type(name) in {type(own) for own, _ in tuned.values()}:
        kernel, accept = name, next(a for own, a in tuned.values() if type(own) is type(name))
    else:
        kernel = Foreign(name, options.target_accept)
        accept = kernel.target_accept
    adaptation = Warmup(kernel, max(20, warmup), options.target_accept or accept, options.metric)
    return Windowed(kernel, target, adaptation, wrap, thin)
