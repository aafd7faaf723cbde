"""The MCMC backend: its options, what it needs of a program, and how a fit goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.stochastic import SGHMC, SGLD
from pgen.algorithms.record import NotRecorded, Recorded
from pgen.algorithms.tempering import ParallelTempering
from pgen.backends.mcmc import start
from pgen.backends.mcmc.annealed import Particles, Tempered
from pgen.backends.mcmc.answers import Posterior, Sampled, same_data
from pgen.backends.mcmc.chains import Chains
from pgen.backends.mcmc.discrete import begun, in_turn, values_of
from pgen.backends.mcmc.evidence import evidence
from pgen.backends.mcmc.groups import Groups, folder_of, on, seed_of
from pgen.backends.mcmc.ledger import Ledger, Memory, Shards, digest
from pgen.backends.mcmc.many import many
from pgen.backends.mcmc.needs import Needs, needs, offer
from pgen.backends.mcmc.preconditioned import Preconditioned, transport_from
from pgen.backends.mcmc.rows import evidence_by_row, independent
from pgen.backends.mcmc.samplers import KERNELS, Idle, Options, sampler_of
from pgen.backends.mcmc.sizes import chains_for, draws_for, kernel_for, tried
from pgen.backends.mcmc.unused import unused
from pgen.capability import Estimate, Exactness, Offer, Refusal
from pgen.choice import Paths, weakest
from pgen.conversion import Adapter
from pgen.density import Density
from pgen.errors import OptionError
from pgen.evaluation import Functions, functions_of
from pgen.normalisers import normalised
from pgen.observers import Audience
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Run
from pgen.structure import Structure

_LONG = 2000  # operations of a log density and its gradient


class _Parts(NamedTuple):
    """What chains on one device are made of."""

    problem: Problem
    density: Density
    functions: Functions
    chains: int
    sampler: Any
    begin: Callable[[], Tensor]
    read: Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class MCMC:
    r"""Sample the posterior by Markov chains, many side by side.

    Exact in the long run, whatever the shape of the posterior; `fitted.summary()` says how far the run is from it.
    Latents with constraints are moved on unconstrained vectors; finite ones are summed out, and drawn given the rest. Discrete
    ones that cannot be summed out are moved in turn with the others: each element from its conditional (Gibbs), counts without
    an end by steps of whole numbers (Metropolis), all elements at once that meet in no term of the density.
    `Run(devices=...)` puts equal groups of chains on several devices, side by side; each group warms up by itself.

    Attributes:
        kernel: `"auto"`, a name, or a kernel object: of `pgen.algorithms.kernels`, or your own, with `init(q, target)` and
            `step(state, tuning, target)`; see `pgen.algorithms.kernels.foreign`.
            `"nuts"`, `"hmc"`, `"chees"`, `"meads"`: Hamiltonian (auto: `"chees"` for 16 chains or more, else `"nuts"`); `"mala"`, `"ula"`: Langevin; `"random-walk"`: needs no
            gradient; `"sgld"`, `"sghmc"`: gradients of mini-batches, biased; `"tempering"`: for separated modes;
            `"smc"`: tempered particles.
        chains: how many, side by side; None: as many as cost little more than one, 32 to 256 (4 where the program
            can only be run for one after the other), on each device.
        warmup: iterations before the first draw; None: what the kernel needs.
        draws: of each chain; None: 20,000 in all, and 400 to 1,000 of each (100 to 200 for programs of thousands of
            operations, such as long loops).
        thin: keep every so many-th draw.
        target_accept: acceptance that the step size is tuned to; None: what suits the kernel.
        metric: `"auto"`, `"dense"` (learns correlations) or `"diagonal"`.
        max_depth: of the trees of NUTS.
        step_size: of "ula", "sgld" and "sghmc", which do not adapt it; in unconstrained units.
        init: where chains begin: `"uniform"` (so does `"auto"`, without `precondition`) on (-2, 2) in unconstrained space, `"prior"`, `"pathfinder"`, values by
            site, or another fit of the same latents, whose posterior draws they then are; or one that observed them, such as the fit
            that learned an energy: its draws, those that suit the data.
        precondition: a variational fit of the same program and data, with `guide="flow"` (or `"full-rank"`, `"low-rank"`,
            `"mean-field"`): chains move in the coordinates of its guide, where a posterior that the guide knows well is
            nearly standard normal, and begin at draws of it. Draws are exact whatever the guide; a poor one only mixes
            slowly, so give it many particles (`particles=256`, `Run(steps=600, lr=1e-2)`). Other data than the fitted
            ones are sampled without it.
        enumerate: `"auto"`: finite latents are summed out where they can be; `"none"`: drawn in turn.
        islands: groups of particles for `log_prob` (of each row, where rows share no latent), whose spread gives its
            standard error.
        via: conversions to go through, by site.

    Example:
        >>> MCMC(kernel="nuts", chains=4, draws=1000).draws
        1000
        >>> MCMC(kernel="nut")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: MCMC(kernel='nut'): expected one of 'auto', ...

    References:
        Hoffman & Gelman (JMLR 2014), Betancourt (2017), Phan, Pradhan & Jankowiak (2019), Hoffman, Radul & Sountsov
        (AISTATS 2021), Hoffman & Sountsov (AISTATS 2022).
    """

    name: ClassVar[str] = "mcmc"
    several_devices: ClassVar[bool] = True

    kernel: str | Kernel = "auto"
    chains: int | None = None
    warmup: int | None = None
    draws: int | None = None
    thin: int = 1
    target_accept: float | None = None
    metric: Literal["auto", "dense", "diagonal"] = "auto"
    max_depth: int = 10
    step_size: float = 0.01
    init: str | Mapping[str, Any] | Any = "auto"
    precondition: Any = None
    enumerate: Literal["auto", "none"] = "auto"
    islands: int = 16
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that options cannot have."""
        if isinstance(self.kernel, str):
            self._one_of("kernel", ("auto", *KERNELS), "or a kernel object")
        elif not (hasattr(self.kernel, "init") and hasattr(self.kernel, "step")):
            raise self._wrong(
                "kernel", "a name, or an object with init(position, target) and step(state, tuning, target)"
            )
        for option in ("chains", "draws", "warmup"):
            if getattr(self, option) is not None:
                self._whole(option, 0 if option == "warmup" else 1)
        self._whole("thin", 1)
        self._whole("max_depth", 1)
        self._whole("islands", 2)
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise self._wrong("target_accept", "a number between 0 and 1")
        self._one_of("metric", ("auto", "dense", "diagonal"))
        self._one_of("enumerate", ("auto", "none"))
        if isinstance(self.init, str):
            self._one_of("init", ("auto", "uniform", "prior", "pathfinder"), "values by site, or another fit")
        if self.precondition is not None:
            object.__setattr__(self, "precondition", transport_from(self.precondition))

    def _one_of(self, option: str, values: tuple[str, ...], more: str = "") -> None:
        if getattr(self, option) not in values:
            raise self._wrong(option, f"one of {', '.join(map(repr, values))} {more}".rstrip())

    def _whole(self, option: str, least: int) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(option, f"a whole number of at least {least}")

    def _wrong(self, option: str, expected: str) -> OptionError:
        return OptionError(f"MCMC({option}={getattr(self, option)!r}): expected {expected}")

    @property
    def _subsampled(self) -> bool:
        return self.kernel in ("sgld", "sghmc") or isinstance(self.kernel, (SGLD, SGHMC))

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Needs a density at every site, and latents that are continuous or finite."""
        found = self._needs(structure)
        if isinstance(found, Refusal):
            return found
        tied = not structure.data_plates or any(not structure.local(s) for s in structure.latents)
        evidence = (tied or independent(structure)) and not found.flipped and bool(found.moved or tied)
        kernel = self.kernel if isinstance(self.kernel, str) else type(self.kernel).__name__
        if kernel == "auto":
            kernel = "hmc" if found.flipped else kernel_for(self.chains)
        return offer(structure, found, kernel, evidence)

    def unused(self, run: Run) -> Mapping[str, str]:
        """Options of a run that are set in vain, each with what there is in its place."""
        return unused(run, batches=self._subsampled)

    def _needs(self, structure: Structure) -> Needs | Refusal:
        return needs(structure, self.via, enumerated=self.enumerate == "auto", subsampled=self._subsampled)

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Posterior:
        """Warm the chains up and draw."""
        fitted = self._sampled(problem, structure, run, run.directory)
        found = self._needs(structure)
        ways: Paths = {} if isinstance(found, Refusal) else found.constants
        constants = {site: Adapter(way) for site, way in ways.items()}
        evidence = partial(self._evidence, run, constants)
        answers = Posterior(fitted, partial(self._others, run, problem), evidence)
        if run.steps != 0:
            audience = fitted.chains.members[0].audience
            audience.start(run, fitted.chains.warmup + fitted.draws)
            fitted.chains.extend(fitted.draws)
            answers.history = fitted.chains.history()
            audience.finish(answers.history)
        return answers

    def posteriors(
        self, problem: Problem, structure: Structure, run: Run, data: Mapping[str, Tensor], n: int
    ) -> list[dict[str, Tensor]] | None:
        """Draws for each of R data sets `[R, ...]`, all chains of all of them in one batch; see `FitsMany`."""
        found = self._needs(structure)
        if isinstance(found, Refusal) or found.flipped:
            return None
        density = self._density(problem, structure, found)
        if not density.size:  # nothing moves: posteriors are drawn at once, one after the other
            return None
        lift = run.precision in (None, "float64") and problem.device.type == "cpu"
        chains = min(8, self.chains or 8)
        options = self._options(chains, run.compile is not False, run)
        return many(density, data, lambda target: self._sampler(options, target), chains, n, run.seed, lift)

    def _evidence(
        self,
        run: Run,
        constants: Mapping[str, Adapter],
        problem: Problem,
        structure: Structure,
        sampled: Callable[[], Sampled],
    ) -> Estimate:
        found = self._needs(structure)
        if not independent(structure) or isinstance(found, Refusal):
            answer = evidence(self.islands, sampled())
        else:
            lift = run.precision in (None, "float64") and problem.device.type == "cpu"
            answer = evidence_by_row(problem, structure, found.summed, self.islands, lift)
        kind = Exactness.ESTIMATE if isinstance(found, Refusal) else found.kind
        answer = normalised(answer, problem, structure, constants)
        return replace(answer, kind=weakest([answer.kind, kind]))

    def _others(
        self, run: Run, fitted: Problem, problem: Problem, structure: Structure, groups: int | None = None
    ) -> Sampled:
        places = None if groups is None else (problem.device,) * groups
        # A guide knows the posterior of the data that it was fitted to.
        one = self if same_data(problem, fitted) else replace(self, precondition=None)
        return one._sampled(problem, structure, run, None, places)

    def _sampled(
        self,
        problem: Problem,
        structure: Structure,
        run: Run,
        directory: Any,
        places: Sequence[torch.device] | None = None,
    ) -> Sampled:
        """Chains of a problem, a group of them on each of several places; None: as the run says."""
        places = tuple(run.places if places is None else places) or (problem.device,)
        one, parts = self._share(len(places)), dict[torch.device, _Parts]()
        for place in dict.fromkeys(places):
            parts[place] = one._parts(on(problem, place) if len(places) > 1 else problem, structure, run)
            one = replace(one, chains=parts[place].chains)  # all groups are of one size
        first = parts[places[0]]
        if run.compile is not False and first.functions.way != "recorded":
            slow = "for one chain after the other" if first.functions.way == "in turn" else "as it is written"
            warnings.warn(
                f"{structure.name} runs {slow}, more slowly: {first.functions.why}", NotRecorded, stacklevel=4
            )
        groups = [
            Chains(
                parts[place].sampler,
                parts[place].begin,
                parts[place].chains,
                seed_of(run.seed, g),
                self._ledger(run, directory, problem, structure, g, len(places)),
                place,
                Audience(() if g else run.watchers()),
            )
            for g, place in enumerate(places)
        ]
        chains = Groups(groups, aside=first.functions.way in ("recorded", "in turn"))
        draws = self.draws or draws_for(chains.count, first.functions.cost[0])
        return Sampled(first.problem, structure, first.density, first.functions, chains, draws, first.read)

    def _share(self, groups: int) -> MCMC:
        """The options of one of several groups."""
        if groups == 1 or self.chains is None:
            return self
        if self.chains % groups:
            raise OptionError(
                f"MCMC(chains={self.chains}): expected a multiple of {groups}, so that each of Run(devices=...) has as many"
            )
        return replace(self, chains=self.chains // groups)

    def _parts(self, problem: Problem, structure: Structure, run: Run) -> _Parts:
        found = self._needs(structure)
        if isinstance(found, Refusal):
            raise OptionError(found.why)
        density = self._density(problem, structure, found)
        lift = run.precision in (None, "float64") and problem.device.type == "cpu"
        dtype = torch.float64 if lift else density.dtype
        recorded = run.compile is not False
        if found.flipped:
            return _Parts(problem, density, *self._in_turn(density, lift, run))
        if not density.size:
            functions = functions_of(density, recorded=recorded, lift=lift)
            chains = self.chains or 4
            begin = partial(torch.zeros, chains, 0, device=problem.device)
            return _Parts(problem, density, functions, chains, Idle(chains), begin, functions.values)
        functions = functions_of(density, rows=self.chains or tried(structure), recorded=recorded, lift=lift)
        target = self._noisy(density, lift, run) if self._subsampled else functions.target
        chains = self.chains or chains_for(functions, self.kernel, structure)
        # To record once more, as parts of a kernel's steps, what is long takes long, and saves little.
        brief = functions.cost[0] < _LONG or run.compile in ("inductor", "background")
        recordable = functions.way in ("recorded", "in turn") and brief
        sampler = self._sampler(self._options(chains, recordable, run), target)
        begin = partial(self._start, functions.target, chains, density, dtype)
        return _Parts(problem, density, functions, chains, sampler, begin, functions.values)

    def _density(self, problem: Problem, structure: Structure, found: Needs) -> Density:
        density = Density.of(problem.whole(), structure, found.summed, tuple(found.flipped))
        return density if self.precondition is None else Preconditioned.by(self.precondition, density)

    def _in_turn(self, density: Density, lift: bool, run: Run) -> tuple[Any, ...]:
        """The parts for latents that are neither moved by gradients nor summed out."""
        if self.kernel not in ("auto", "hmc"):
            raise OptionError(
                f"MCMC(kernel={self.kernel!r}): {', '.join(density.held)} are discrete and moved in turn with the others, which "
                "goes with kernel='auto' or 'hmc'"
            )
        chains = 64 if self.chains is None else self.chains
        options = self._options(chains, run.compile is not False, run)
        sampler = in_turn(density, lift, options.wrap, self.warmup, self.target_accept, self.thin)

        def begin() -> Tensor:
            dtype = torch.float64 if lift else density.dtype
            z, q = begun(sampler, chains, dtype)
            if density.size:
                target = partial(_given, sampler.target.continuous, z)
                way = start.uniform if self.precondition is None else start.base
                q = way(target, chains, density.size, density, dtype)
            return torch.cat([q, z.to(q.dtype)], 1)

        functions = Functions(sampler.target.continuous, density.values, "recorded")  # type: ignore[arg-type]
        return functions, chains, sampler, begin, partial(values_of, density, sampler.flips)

    def _noisy(self, density: Density, lift: bool, run: Run) -> Any:
        """The density on a batch of rows, another one at every call."""
        rows = density.problem.total or 1
        size = min(run.batch_size or max(32, rows // 10), rows)
        return Recorded(partial(_on_a_batch, density, size), lift=lift)

    def _sampler(self, options: Options, target: Any) -> Any:
        if self.kernel == "tempering":
            return Tempered(ParallelTempering(HMC(steps=8)), target, options.wrap, options.chains, self.thin)
        return (
            Particles(target, options.wrap, options.chains)
            if self.kernel == "smc"
            else sampler_of(options, target)
        )

    def _options(self, chains: int, recorded: bool, run: Run) -> Options:
        return Options(
            kernel_for(chains) if self.kernel == "auto" else self.kernel,
            chains,
            self.warmup,
            self.target_accept,
            self.metric,
            self.max_depth,
            self.step_size,
            self.thin,
            recorded,
            run.compile,
        )

    def _start(self, target: Any, chains: int, density: Density, dtype: torch.dtype) -> Tensor:
        if isinstance(self.init, Mapping):
            return start.given(self.init, chains, density, dtype)
        # A reference for particles is made from many points, wherever chains would begin.
        count = max(chains, 512) if self.kernel in ("smc", "tempering") else chains
        if not isinstance(self.init, str):
            return start.learned(self.init, count, density, dtype)
        ways = {"uniform": start.uniform, "prior": start.prior, "pathfinder": start.pathfinder}
        usual = start.uniform if self.precondition is None else start.base
        return ways.get(self.init, usual)(target, count, density.size, density, dtype)

    def _ledger(
        self, run: Run, directory: Any, problem: Problem, structure: Structure, group: int, groups: int
    ) -> Ledger:
        if directory is None:
            return Memory()
        terms = {
            "program": structure.name,
            "data": digest(problem),
            "seed": run.seed,
            "precision": run.precision,
            "backend": repr(replace(self, draws=None)),
        }
        if groups > 1:
            terms["group"] = f"{group + 1} of {groups}"
        return Shards(folder_of(Path(directory), group, groups), terms, run.checkpoint_every or 100)


def _given(continuous: Any, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return continuous(q, z)


def _on_a_batch(density: Density, size: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    return density.on_a_batch(positions, size)


@hookimpl
def pgen_backends() -> list[type]:
    """The backend, for the registry."""
    return [MCMC]
