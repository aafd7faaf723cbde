"""Masked diffusion: a law of tokens that reveals them place by place, in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.algorithms.diffusion import masked, masked_exact, masked_sample
from pgen.algorithms.diffusion.masked_views import (
    SCHEDULES,
    Counts,
    EveryView,
    MaskSchedule,
    Orders,
    Viewing,
    along,
)
from pgen.algorithms.diffusion.noise import Streams
from pgen.capability import Capability, Estimate, Exactness
from pgen.distributions.rows import expand_context
from pgen.distributions.token_rows import TokenRows
from pgen.errors import Intractable, OptionError
from pgen.handlers import Lent


class MaskedDiffusion(TorchDistribution):
    r"""A law of integers $0, \ldots, L - 1$ at every place, learned by guessing hidden ones from those shown.

    .. math::
        \log p(x) \;\ge\; \sum_{k=1}^{D} \frac1k\; \mathbb{E}_{|H| = k} \sum_{i \in H}
        \log p_\theta(x_i \mid x_{\setminus H}, c)

    where H is a random set of k of the D places. That is the likelihood bound of absorbing-state diffusion in
    continuous time, with the time integrated out; it does not depend on the noise schedule. One network gives
    the law of every place given any others, so the model is autoregressive in all orders at once, fills in
    what is missing (`infill`), and gives conditional laws (`conditional`) in one pass.

    `bound(value)` is stochastic, with gradients for the network, and finite variance however the times fall.
    There is no `log_prob`, but `log_prob_in_order(value, order)` is exact for the model in that order, and
    for up to 12 places `exact_bound(value)` and `exact_log_prob(value)` list all sets of places.

    How to make a network for it: a callable from tokens of shape `[rows, *event_shape]`, in which the number
    `levels` stands for a hidden place (and a context of shape `[rows, c]`, where one is given), to logits of
    shape `[rows, *event_shape, levels]`, such as `pgen.nn.TokenTransformer`. It may hear all places: what it
    says of a place that is shown is not used. It needs no time: how many are hidden, it sees. A last logit for
    the mask itself, as other libraries' networks have, is left out.

    Args:
        network: gives the logits of every place.
        levels: how many values a place can have.
        event_shape: shape of one value.
        context: what the law is conditioned on, shape `[*batch_shape, c]`, or None.
        schedule: the chance of being hidden at a time, for drawing in `steps`: "log-linear", "cosine" or an
            object with `masked(t)` and `rate(t)`.
        steps: how many to draw in; None for one place at a time in a random order, which is the law that the
            bound is about. Fewer steps are faster and reveal some places at a time, as if independent.
        particles: views of a value for one evaluation of the bound.
        validate_args: whether values are checked against the support; None for torch's default.

    Raises:
        OptionError: fewer than two levels, no particles, no steps, or a schedule that is not known.
        ProgramError: (when used) the network gives logits of a wrong shape.
        Intractable: `log_prob` was asked for; it is a `NotImplementedError` too.

    References:
        Structured denoising diffusion models in discrete state-spaces (Austin et al., NeurIPS 2021).
        Simple and effective masked diffusion language models (Sahoo et al., NeurIPS 2024).

    Example:
        >>> from pgen.nn.tokens import TokenTransformer
        >>> law = MaskedDiffusion(TokenTransformer(8, levels=5, width=16), 5, (8,))
        >>> x = law.sample((3,))
        >>> law.bound(x).shape
        torch.Size([3])
        >>> law.bound_with_error(x).mean()  # a new network knows nothing: -8 log 5
        Estimate(-12.8755 ± ... nats, lower bound, log mass, mean)
    """

    capabilities = frozenset({Capability.SAMPLE, Capability.BOUND})
    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = False

    def __init__(
        self,
        network: Callable[..., Tensor],
        levels: int,
        event_shape: tuple[int, ...] | Size,
        *,
        context: Tensor | None = None,
        schedule: str | MaskSchedule = "log-linear",
        steps: int | None = None,
        particles: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if levels < 2 or particles < 1 or (steps is not None and steps < 1):
            raise OptionError(
                f"MaskedDiffusion(levels={levels}, steps={steps}, particles={particles}): expected at least 2 levels, "
                "1 particle and 1 step (or None), e.g. MaskedDiffusion(network, levels=5, event_shape=(8,))"
            )
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise OptionError(
                f"MaskedDiffusion(schedule={schedule!r}): expected one of {', '.join(map(repr, SCHEDULES))}, or an "
                "object with masked(t) and rate(t)"
            )
        self.network, self.levels, self.context = network, levels, context
        self.schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.steps, self.particles = steps, particles
        batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The levels, at every place."""
        interval = constraints.integer_interval(0, self.levels - 1)
        return constraints.independent(interval, len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> MaskedDiffusion:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(MaskedDiffusion, _instance)
        new.network, new.levels, new.schedule = self.network, self.levels, self.schedule
        new.steps, new.particles = self.steps, self.particles
        new.context = expand_context(self.context, Size(batch_shape))
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> MaskedDiffusion:
        """The same law, whose network is called in a context: where its tensors are lent to it."""
        new = self.expand(self.batch_shape)
        new.network = Lent(self.network, context)
        return new

    def bound(self, value: Tensor, *, views: Viewing | None = None) -> Tensor:
        """A stochastic lower bound on the log probability: in nats, `[..., *batch_shape]`; fresh at every call.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`.
            views: how to look at them: `Counts(n)`, `Orders(n)`, `Times(n)` or `EveryView()` of
                `pgen.algorithms.diffusion.masked_views`, or one's own; None for `Counts(particles)`.
        """
        tokens, lead, predict = self._tokens(value)
        views = Counts(self.particles) if views is None else views
        return masked.bound(predict, tokens, views(tokens), self.levels).reshape(lead)

    @torch.no_grad()
    def bound_with_error(self, value: Tensor, repeats: int = 8, *, views: Viewing | None = None) -> Estimate:
        """The bound for evaluation: the mean of independent repeats, with its standard error.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`.
            repeats: how many, at least two.
            views: of one repeat; None for `Orders(1)`: one random order, all places in turn. Its repeats
                differ only as far as the conditionals of the network contradict one another.

        Returns:
            An estimate whose `value` and `stderr` have shape `[..., *batch_shape]`; its `particles` are views.
        """
        if repeats < 2:
            raise OptionError(
                f"bound_with_error(repeats={repeats}): a standard error takes 2 or more repeats"
            )
        tokens, lead, predict = self._tokens(value)

        def once() -> tuple[Tensor, int]:
            seen = (views or Orders(1))(tokens)
            return masked.bound(predict, tokens, seen, self.levels), len(seen.hidden)

        found, passes = zip(*(once() for _ in range(repeats)), strict=True)
        draws = torch.stack(found)
        return Estimate(
            draws.mean(0).reshape(lead),
            Exactness.LOWER_BOUND,
            stderr=(draws.std(0) / math.sqrt(repeats)).reshape(lead),
            measure="mass",
            dims=tokens.shape[1],
            particles=sum(passes),
        )

    def exact_bound(self, value: Tensor) -> Tensor:
        """What `bound` is on average, with gradients: in nats, `[..., *batch_shape]`.

        Raises:
            OptionError: there are more than 12 places, too many to list all sets of hidden ones.
        """
        self._rows.few("exact_bound", "bound_with_error(value)")
        return self.bound(value, views=EveryView())

    def exact_log_prob(self, value: Tensor) -> Tensor:
        """Log probability of being drawn by `sample` with `steps=None`: in nats, `[..., *batch_shape]`.

        Raises:
            OptionError: there are more than 12 places, too many to list all sets of hidden ones.
        """
        self._rows.few("exact_log_prob", "log_prob_in_order(value, order)")
        tokens, lead, predict = self._tokens(value)
        return masked_exact.log_law(predict, tokens, self.levels).reshape(lead)

    def log_prob_in_order(self, value: Tensor, order: Tensor, known: Tensor | None = None) -> Tensor:
        """Exact log probability of the model that reveals places in this order: in nats, `[..., *batch_shape]`.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`.
            order: flattened places, first revealed first. Those left out stay hidden: the result is the
                marginal log probability of the others.
            known: booleans that broadcast against `value`: places given from the start, not in the order.

        Raises:
            OptionError: `order` names a place twice, or one that there is not or that is known.
        """
        tokens, lead, predict = self._tokens(value)
        given = torch.zeros_like(tokens, dtype=torch.bool) if known is None else self._rows.flags(known, lead)
        listed = self._rows.order(order, given)
        rank = torch.full_like(tokens, len(listed)).masked_fill(given, -1)
        rank[:, listed] = torch.arange(len(listed), device=tokens.device)
        return masked.bound(predict, tokens, along(rank, len(listed)), self.levels).reshape(lead)

    def conditional(self, value: Tensor, known: Tensor) -> dist.Categorical:
        """The laws of every place given the known ones, of batch shape that of `value`; certain where known.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`; those elsewhere do not matter.
            known: booleans that broadcast against `value`.
        """
        tokens, given, lead = self._partly(value, known)
        logits = masked.conditional_logits(self._rows.over(lead), tokens, given, self.levels)
        shape = lead + self.event_shape + (self.levels,)
        return dist.Categorical(logits=logits.reshape(shape), validate_args=False)

    @torch.no_grad()
    def sample(
        self, sample_shape: _size = (), *, steps: int | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw values: shape `[*sample_shape, *batch_shape, *event_shape]`.

        Args:
            sample_shape: of the draws.
            steps: see the class; None for its `steps`.
            seed: of the draws; draw i of a seed is the same whatever is drawn beside it, up to the rounding
                of the network. None: a new one from torch's generator.
        """
        lead = Size(sample_shape) + self.batch_shape
        rows = self._rows
        tokens = torch.zeros(lead.numel(), rows.places, dtype=torch.long, device=rows.device)
        return self._reveal(tokens, torch.zeros_like(tokens, dtype=torch.bool), lead, steps, seed)

    @torch.no_grad()
    def infill(
        self, value: Tensor, known: Tensor, n: int, *, steps: int | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw what is not known, given what is: shape `[n, ..., *batch_shape, *event_shape]`.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`; those elsewhere do not matter.
            known: booleans that broadcast against `value`.
            n: how many draws of each.
            steps: see the class; None for its `steps`.
            seed: as for `sample`.
        """
        tokens, given, lead = self._partly(value, known)
        return self._reveal(tokens.repeat(n, 1), given.repeat(n, 1), Size((n,)) + lead, steps, seed)

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not to be had: raises Intractable."""
        raise Intractable(
            f"MaskedDiffusion has no log_prob: it is a mean over the {self._rows.places}! orders of revealing the places. It "
            "lacks Capability.LOG_PROB and has Capability.BOUND: use bound(value), or log_prob_in_order(value, "
            "order), which is exact for one order"
        )

    @property
    def _rows(self) -> TokenRows:
        return TokenRows(self.network, self.levels, self.event_shape, self.batch_shape, self.context)

    def _tokens(self, value: Tensor) -> tuple[Tensor, Size, masked.Predict]:
        """The value as rows of tokens, the shape that the rows had, and the network over them."""
        if self._validate_args:
            self._validate_sample(value)
        rows = self._rows
        tokens, lead = rows.flat(value)
        return tokens, lead, rows.over(lead)

    def _partly(self, value: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Size]:
        """The same of a value known in part, and where it is known."""
        tokens, given, lead = self._rows.partly(value, known)
        if self._validate_args:
            self._validate_sample(tokens.reshape(lead + self.event_shape))
        return tokens, given, lead

    def _reveal(
        self, tokens: Tensor, given: Tensor, lead: Size, steps: int | None, seed: int | None
    ) -> Tensor:
        steps = self.steps if steps is None else steps
        if steps is not None and steps < 1:
            raise OptionError(f"MaskedDiffusion: steps={steps}; expected 1 or more, or None")
        drawn = masked_sample.infilled(
            self._rows.over(lead),
            tokens,
            given,
            Streams(int(torch.randint(2**62, ())) if seed is None else seed, len(tokens)),
            self.levels,
            steps=steps,
            schedule=self.schedule,
        )
        return drawn.reshape(lead + self.event_shape)
