"""The most probable values of continuous latents, learned as parameters are: maximum a posteriori."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pgen.backends.exact.climb import Climb, differentiated, maximise
from pgen.backends.exact.finite import FinitePart
from pgen.backends.exact.groups import groups_of
from pgen.capability import Capability, Offer, Query, Rank, Refusal
from pgen.choice import Paths, drawing, names_of, refusal_text
from pgen.enumeration import enumerate_sites
from pgen.errors import Refused
from pgen.history import History
from pgen.isolation import validating
from pgen.learning import watched
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.run import Player, Run, Step
from pgen.sampling import draw
from pgen.structure import Structure

_DRAWS = 9  # from the prior, to begin at their median


def examine_mode(structure: Structure, paths: Paths, learned: Paths) -> Offer | Refusal:
    """Offer draws of the program only: a point is neither a posterior nor an evidence."""
    drawn = [s for s in structure.latents if not structure.sites[s].enumerable]
    for name in drawn:
        if structure.sites[name].discrete:
            law = structure.sites[name].distribution
            return Refusal(name, "a finite or continuous support", f"{law} at {name!r} counts without end")
    whole = drawing(structure, paths)
    if whole is None:
        why = (
            f"nothing draws from all of the sites of {structure.name}, and draws are all that a point answers"
        )
        return Refusal(None, Capability.SAMPLE.value, why)
    why = f"the most probable values of {', '.join(drawn[:4]) or 'no latent'} are learned as parameters are"
    return Offer({Query.SAMPLE: whole[1]}, Rank.POSSIBLE, why, names_of(whole[0]), names_of(learned))


class At(Messenger):
    """Set latents to points given in unconstrained coordinates."""

    def __init__(self, points: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.points = points

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.points and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self.points[msg["name"]])
            msg["done"] = True


class Mode:
    """A program with the most probable values of its continuous latents.

    They stand in `parameters.tensors` under the names of their sites, beside what the program learned.
    """

    def __init__(self, problem: Problem, structure: Structure, parameters: Parameters) -> None:
        self.problem = problem
        self.structure = structure
        self.parameters = parameters
        self.history = History()

    def tensors(self) -> Mapping[str, Tensor]:
        """The learned tensors, and the values of the latents that no row has to itself."""
        rows = {s for s in self.structure.latents if self.structure.local(s)}
        return {name: tensor for name, tensor in self.parameters.state().items() if name not in rows}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved tensors over."""
        self.parameters.load({**self.parameters.state(), **tensors})

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Joint draws of every site, by running the program forward."""
        with self.parameters.installed():
            return draw(self.problem, self.structure, n)


def fit_mode(
    problem: Problem, structure: Structure, parameters: Parameters, run: Run, max_table: int
) -> Mode:
    """Climb the joint density in the learned tensors and the continuous latents, on all rows at once."""
    fitted, problem = Mode(problem, structure, parameters), problem.learning
    with parameters.installed():
        points = _start(problem, structure)
    count = problem.rows or 1

    def loss(batch: Problem, step: Step) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        with validating(step.first):
            return -_log_joint(batch, structure, points, max_table) / count, batch.told()

    if parameters.tensors:
        player = Player(
            {**parameters.tensors, **{f"mode of {k}": v for k, v in points.items()}},
            loss,
            watched(problem.learners),
            lambda step: parameters.installed(step.training),
        )
        fitted.history = maximise(player, problem.whole(), structure, run, parameters.buffers)
    with parameters.installed(), torch.enable_grad():
        if points:
            free = list(points.values())
            Climb(
                differentiated(lambda: -_log_joint(problem, structure, points, max_table) / count, free), free
            ).go()
        with torch.no_grad():
            nodes: Any = poutine.trace(At(points)(problem)).get_trace().nodes
    parameters.tensors |= {name: nodes[name]["value"].detach() for name in points}
    return fitted


def _start(problem: Problem, structure: Structure) -> dict[str, Tensor]:
    """A middling draw from the prior of every continuous latent that the data bears upon, unconstrained."""
    names = [s for s in structure.evidenced if not structure.sites[s].enumerable]
    if not names:
        return {}
    with torch.no_grad():
        draws: list[Any] = [poutine.trace(problem).get_trace().nodes for _ in range(_DRAWS)]
        points = {}
        for name in (s for s in structure.latents if s in names):
            free = [biject_to(nodes[name]["fn"].support).inv(nodes[name]["value"]) for nodes in draws]
            points[name] = torch.stack(free).median(0).values.requires_grad_()
    return points


def _log_joint(
    problem: Problem, structure: Structure, points: Mapping[str, Tensor], max_table: int
) -> Tensor:
    """Log joint density at the points, summed over finite latents."""
    run = At(points)(problem)
    finite = [s for s in structure.evidenced if structure.sites[s].enumerable]
    counted = {*structure.observed, *structure.factors, *points}
    if not finite:
        factors = enumerate_sites(run, structure).factors
        return torch.stack([factors[s].log.sum() for s in structure.sites if s in counted]).sum()
    groups = groups_of(structure, finite, max_table, held=points)
    if isinstance(groups, Refusal):
        raise Refused(f"most probable values in {structure.name}: {refusal_text(groups)}", groups)
    part = FinitePart.of(run, structure, groups, None, max_table)
    rest = [f.log.sum() for name, f in part.enumeration.factors.items() if name in counted - part.sites]
    return part.evidence() + sum(rest)
