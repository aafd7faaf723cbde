"""The players of a fit: whose tensors move, by which loss."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgen.algorithms.bounds import warmup
from pgen.backends.variational import objectives
from pgen.backends.variational.joint import Coupling
from pgen.backends.variational.objectives import Baselines, Loss, Regularizer
from pgen.backends.variational.simulate import simulations
from pgen.errors import OptionError
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.run import Player, Step
from pgen.training.batches import generators


@dataclass(frozen=True)
class Terms:
    """What losses need to know of the options."""

    objective: str
    particles: int
    alpha: float = 0.0
    beta: float = 1.0
    warmup: float = 0.0
    free_bits: float = 0.0
    free_bits_per: Literal["site", "dimension"] = "site"
    sleep: float = 0.0


class Players:
    """Makes the players: one for a bound, two for wake-sleep where program and guide share no tensor."""

    def __init__(
        self,
        terms: Terms,
        parameters: Parameters,
        coupling: Coupling,
        watched: Mapping[str, str] | None = None,
    ) -> None:
        """Begin with baselines of zero."""
        self.terms, self.parameters, self.coupling = terms, parameters, coupling
        self.watched = watched or {}
        device = next((t.device for t in parameters.tensors.values()), None)
        self.baselines = Baselines({s: torch.zeros((), device=device) for s in coupling.scored})

    @property
    def buffers(self) -> MutableMapping[str, Tensor]:
        """What the losses change in place: a live view."""
        return ChainMap(self.parameters.buffers, self.baselines.averages)

    def of(self, few: Problem) -> dict[str, Player]:
        """The players; some rows show which tensors program and guide read."""
        everything = self.parameters.tensors
        losses = {
            "elbo": self._elbo,
            "dreg": self._doubly,
            "iwae": self._importance,
            "renyi": self._importance,
        }
        if self.terms.objective in losses:
            return {"variational": self._player(everything, losses[self.terms.objective])}
        program, guide = self._sides(few)
        if program.keys() & guide.keys():
            return {"variational": self._player(everything, self._wake_both)}
        return {
            "program": self._player(program, self._wake_program),
            "guide": self._player(guide, self._wake_guide),
        }

    def asleep(self, few: Problem, loss: Callable[[Problem, Step], Loss]) -> dict[str, Player]:
        """The guide alone: the program stays as it is."""
        program, guide = self._sides(few)
        own = {name: tensor for name, tensor in guide.items() if name not in program}
        if not own:
            raise OptionError(
                "objective='forward-kl' trains the guide alone, and this one has no learned tensors of its "
                "own"
            )
        return {"guide": self._player(own, loss)}

    def _player(self, tensors: Mapping[str, Tensor], loss: Callable[[Problem, Step], Loss]) -> Player:
        return Player(
            tensors, guarded(loss), self.watched, lambda step: self.parameters.installed(step.training)
        )

    # --- one loss for all ---------------------------------------------------------------------------------

    def _elbo(self, batch: Problem, step: Step) -> Loss:
        terms, lanes = self.terms, self.coupling.weigh(batch, self.terms.particles)
        if not step.training:
            return objectives.elbo(self.coupling, batch, lanes, Regularizer())
        beta = terms.beta * warmup(step.number, step.steps, terms.warmup)
        regularizer = Regularizer(beta, terms.free_bits, terms.free_bits_per)
        return objectives.elbo(self.coupling, batch, lanes, regularizer, self.baselines)

    def _importance(self, batch: Problem, step: Step) -> Loss:
        lanes = self.coupling.weigh(batch, self.terms.particles)
        return objectives.importance(self.coupling, batch, lanes, self.terms.particles, self.terms.alpha)

    def _doubly(self, batch: Problem, step: Step) -> Loss:
        # Dropout in the guide must fall as it fell when the latents were drawn, or `log q` is of another law.
        places = generators([t.device for t in self.parameters.tensors.values()])
        before = [g.get_state() for g in places]
        fixed = self.parameters.frozen()
        # Leaves of their own, since `pyro.module` warns of tensors that need no gradient while training.
        fixed.tensors = {name: tensor.requires_grad_() for name, tensor in fixed.tensors.items()}

        @contextmanager
        def frozen() -> Iterator[None]:
            after = [g.get_state() for g in places]
            for generator, state in zip(places, before):
                generator.set_state(state)
            with fixed.installed(step.training):
                yield
            for generator, state in zip(places, after):
                generator.set_state(state)

        return objectives.doubly(self.coupling, batch, self.terms.particles, frozen)

    # --- one for the program, one for the guide -----------------------------------------------------------

    def _sides(self, few: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that `log p` reads (and those that nothing reads), and those that `log q` reads."""
        tensors = self.parameters.tensors
        with torch.random.fork_rng(), torch.enable_grad(), self.parameters.installed(training=False):
            lanes = self.coupling.weigh(few, 1, detach=True)
            sides = [
                self.coupling.program_terms(lanes),
                self.coupling.guide_terms([lane.guide for lane in lanes]),
            ]
            totals = [sum(term.value.sum() for term in side.values()) for side in sides]
            read = [
                torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
                if isinstance(total, Tensor) and total.requires_grad
                else [None] * len(tensors)
                for total in totals
            ]
        program = {n: t for (n, t), p, q in zip(tensors.items(), *read) if p is not None or q is None}
        return program, {n: t for (n, t), q in zip(tensors.items(), read[1]) if q is not None}

    def _wake_program(self, batch: Problem, step: Step) -> Loss:
        several = self.terms.particles
        with torch.no_grad():
            guides = self.coupling.draw(batch, several)
        return objectives.wake(self.coupling, batch, self.coupling.follow(batch, guides, several), several)[0]

    def _wake_guide(self, batch: Problem, step: Step) -> Loss:
        several = self.terms.particles
        guides = self.coupling.draw(batch, several, detach=True)
        with torch.no_grad():
            lanes = self.coupling.follow(batch, guides, several)
        return self._with_sleep(batch, objectives.wake(self.coupling, batch, lanes, several)[1])

    def _wake_both(self, batch: Problem, step: Step) -> Loss:
        """Both halves from one run, where program and guide share tensors."""
        lanes = self.coupling.weigh(batch, self.terms.particles, detach=True)
        program, guide = objectives.wake(self.coupling, batch, lanes, self.terms.particles)
        guide = self._with_sleep(batch, guide)
        return program[0] + guide[0] - guide[0].detach(), program[1]

    def _with_sleep(self, batch: Problem, wake: Loss) -> Loss:
        share = self.terms.sleep
        if not share:
            return wake
        with torch.no_grad():
            dreamt, values = simulations(batch, self.coupling, batch.rows)
        asleep = objectives.sleep(self.coupling, dreamt, self.coupling.redraw(dreamt, [values], 1))
        return (1 - share) * wake[0] + share * asleep[0], {**wake[1], **asleep[1]}


def guarded(loss: Callable[[Problem, Step], Loss]) -> Callable[[Problem, Step], Loss]:
    """A loss without the validation that was done before it began."""

    def on(batch: Problem, step: Step) -> Loss:
        with validating(False):
            value, metrics = loss(batch, step)
            return value, {**metrics, **batch.told()}

    return on
