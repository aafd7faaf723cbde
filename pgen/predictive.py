"""For each posterior draw, new data and how probable the data is: all rows of every observed site, many draws at once.

Three ways to run a program on many draws give the same answer; the first that can is taken. Side by side under an
outer plate, where the program is seen to take leading dimensions. Under `torch.vmap`, to which each draw looks like
the only one, so that `X @ w` and sums over everything stay right. One after another, for programs that branch on a
draw or use laws that `vmap` cannot sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.errors import DataError
from pgen.handlers import Substitute
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.sampling import particles, split, spread, vectorizes
from pgen.structure import Structure

_AT_ONCE = 1 << 22  # numbers in the data and draws that are run together


def predictive(problem: Problem, structure: Structure, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New draws of every observed site, all its rows, one for each draw of the latents: `[n, *site shape]`.

    Inputs of the program (covariates) are those of the problem. Latents that `draws` leaves out (finite ones that were
    summed out, or those of rows that are new) are drawn from their laws in the program, given the others.

    Args:
        problem: the program with its data; the observations are ignored.
        structure: its structure.
        draws: values `[n, *site shape]` of latent sites.

    Raises:
        DataError: there are no draws, or they do not have the shape of the site.
    """
    given = _checked(problem, structure, draws)
    ask = _Ask(
        problem.forward(), structure, lambda n: n["value"], lambda s: len(structure.sites[s].event_shape)
    )
    return _through(ask, problem, given)


def log_likelihood(problem: Problem, structure: Structure, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pointwise log likelihood in nats of every observed site, given each draw of the latents: `[n, *batch_shape]`.

    Missing observations count for nothing (0), and no element counts for more than one.

    Args:
        problem: the program with its data.
        structure: its structure.
        draws: values `[n, *site shape]` of all latent sites.

    Raises:
        DataError: a latent has no draws, or they do not have the shape of the site.
    """
    absent = [s for s in structure.latents if s not in draws]
    if absent:
        raise DataError(
            f"log_likelihood needs draws of every latent site, and has none of {', '.join(absent)}; it is the "
            "probability of the data given all of them"
        )
    given = _checked(problem, structure, draws)
    return _through(_Ask(problem, structure, _log_prob, lambda s: 0), problem, given)


def _log_prob(node: Any) -> Tensor:
    return scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, node["mask"])


def _checked(problem: Problem, structure: Structure, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws of the latents, all of one number and of the shapes of their sites."""
    given = {s: draws[s].detach() for s in structure.latents if s in draws}
    if not given:
        raise DataError(
            f"expected draws of latent sites ({', '.join(structure.latents) or 'the program has none'}); got "
            f"{', '.join(draws) or 'nothing'}"
        )
    count = len(next(iter(given.values())))
    for site, value in given.items():
        law = structure.sites[site]
        batch = list(law.batch_shape)
        for plate in (structure.plates[p] for p in law.plates if p in structure.data_plates):
            batch[plate.dim] = problem.rows if problem.rows is not None else batch[plate.dim]
        expected = (count, *batch, *law.event_shape)
        if tuple(value.shape) != expected:
            raise DataError(
                f"draws of {site!r} have shape {tuple(value.shape)}; expected {expected}, a value for each of "
                f"{count} draws. Leave the site out, if it is to be drawn anew for other rows"
            )
    return given


@dataclass(frozen=True)
class _Ask:
    """What is asked of a run for each draw.

    Attributes:
        program: what is run.
        structure: its structure.
        read: from the node of an observed site to what is asked for.
        events: how many event dimensions that has at a site.
    """

    program: Problem
    structure: Structure
    read: Callable[[Any], Tensor]
    events: Callable[[str], int]

    def side_by_side(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All draws under one outer plate."""
        structure, count = self.structure, len(next(iter(given.values())))
        laid = {s: spread(v, structure, s) for s, v in given.items()}
        trace = poutine.trace(Substitute(laid)(particles(self.program, structure, count))).get_trace()
        out = {}
        for s in structure.observed:
            value = split(self.read(trace.nodes[s]), structure, s, self.events(s))
            out[s] = value.expand((count, *value.shape[1:]))
        return out

    def mapped(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each draw by itself: through `vmap`, or one after another."""
        try:
            return torch.vmap(self.once, randomness="different")(dict(given))
        except Exception:  # it branches on a value, or samples in a way that vmap does not know
            count = len(next(iter(given.values())))
            runs = [self.once({s: v[i] for s, v in given.items()}) for i in range(count)]
            return {s: torch.stack([r[s] for r in runs]) for s in self.structure.observed}

    def once(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One draw."""
        trace = poutine.trace(_Sampled()(Substitute(values)(self.program))).get_trace()
        return {s: self.read(trace.nodes[s]) for s in self.structure.observed}


def _through(ask: _Ask, problem: Problem, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answers at every observed site for all draws, some at a time."""
    count = len(next(iter(given.values())))
    data = sum(v.numel() for v in (*problem.inputs.values(), *problem.observations.values()))
    each = max(1, _AT_ONCE // max(1, data + sum(v[0].numel() for v in given.values())))
    with torch.no_grad(), validating(False):
        run = ask.side_by_side if vectorizes(problem, ask.structure) else ask.mapped
        parts = [run({s: v[i : i + each] for s, v in given.items()}) for i in range(0, count, each)]
    return {s: torch.cat([p[s] for p in parts]) for s in parts[0]}


class _Sampled(Messenger):
    """Draw by `sample` in place of `rsample`, whose noise `vmap` would share among draws or refuse."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and hasattr(msg["fn"], "sample"):
            msg["value"] = msg["fn"].sample()
