r"""Log densities of diffusions: a cheap path, few traces, and an account of the error.

Along any path x(.) from values at the least noise level to the largest, by the continuity equation of the
probability-flow velocity v = x - D(x, sigma) in l = log sigma, with score s = (D(x, sigma) - x) / sigma^2,

    log p_min(x) = log p_max(x(L)) + int (d - tr J) dl - int s' (dx/dl - v) dl

The last term is 0 for the flow itself. So the three are computed apart, each as cheaply as it can be:

1. The path by an adaptive solver with values between its steps: some hundred evaluations, no trace.
2. The traces, which are what costs, only at the nodes of a Gauss-Kronrod rule: the integrand is smooth in l, and some fifty
   nodes do where a solver that carries the trace along takes it at every stage of every step. Where the two nested rules
   disagree for a row, its worst panel is halved. Estimated traces have fresh probes at every node, so their errors
   average out, and their variances add up to a standard error.
3. The path's own error, by the last term, to first order: it is added, and its size is a part of the reported error.
   Where D is exact the correction makes any path a right one; where it is learned, the density meant is that of the flow,
   and what remains is (s - the flow's own score) times the path's error.

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021, appendix D.2.
    Grathwohl et al., FFJORD, ICLR 2019 (one probe for the whole path).
    Piessens, de Doncker-Kapenga, Uberhuber & Kahaner, QUADPACK, Springer, 1983 (the rule and its error estimate).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.diffusion.adaptive_ode import Path, adaptive_ode
from pgen.algorithms.diffusion.divergence import Divergence, Exact, Hutchinson, HutchPP, Jacobian, Noise
from pgen.algorithms.diffusion.field import Field, per_row
from pgen.algorithms.diffusion.quadrature import Values, integrate, student_quantile
from pgen.algorithms.diffusion.terminal import matched

_PANEL = 2.5  # widest first panel, in log noise level
_SMALL = 128  # scalars of an event, up to which the trace is taken exactly
_FLAT = 2**18  # scalars of all directions at nodes that are evaluated together
_LOBATTO = tuple(  # the rule of 6 nodes on [0, 1] without its ends, where a path has the flow's own slope
    ((1 + sign * (1 / 3 + side * 2 * 7**0.5 / 21) ** 0.5) / 2, (14 - side * 7**0.5) / 60)
    for side in (1, -1)
    for sign in (-1, 1)
)

LogDensity = Callable[[Tensor], Tensor]
"""Log density at the largest noise level: from `[B, *event]` to `[B]`."""


class Result(NamedTuple):
    """Log densities, in nats.

    Attributes:
        value: `[B]`.
        stderr: standard error from estimated traces, `[B]`; None where they are exact.
        freedom: its degrees of freedom (Welch and Satterthwaite's), `[B]`; None where there is none.
        solver_error: of the integration, `[B]`: the disagreement of nested rules and the correction of the path.
        evaluations: of the denoiser for each row, `[B]`.
        products: of its Jacobian with a direction for each row, `[B]`.
    """

    value: Tensor
    stderr: Tensor | None
    freedom: Tensor | None
    solver_error: Tensor
    evaluations: Tensor
    products: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """An interval that holds the log density with this probability, over probes: two tensors `[B]`.

        Half its width is the root of the sum of squares of the solver's error, as it is, and of the standard error times
        Student's quantile: the two know nothing of each other.
        """
        width = self.solver_error
        if self.stderr is not None and self.freedom is not None:
            width = torch.hypot(width, student_quantile(0.5 + level / 2, self.freedom) * self.stderr)
        return self.value - width, self.value + width


def log_prob(
    x: Tensor,
    field: Field,
    sigma_min: float,
    sigma_max: float,
    prior: LogDensity | None = None,
    *,
    divergence: Divergence | str = "auto",
    tolerance: float = 1e-5,
    error: float = 5e-3,
    most: int = 20,
    flat: bool = False,
    differentiable: bool = False,
) -> Result:
    r"""The log density of the diffusion at noise level `sigma_min`, by its probability-flow equation.

    Args:
        x: values `[B, *event]`.
        field: the denoiser; with random numbers where traces are estimated. It is called with all rows in order, so it
            may carry a context for each of them, unless `flat`.
        sigma_min: noise level of x.
        sigma_max: noise level of the prior.
        prior: log density at `sigma_max`; None: the normal law the denoiser has there (see `terminal.matched`).
        divergence: a way to the trace, or `"exact"`, `"hutchinson"` (8 probes), `"hutch++"` (30 products), or `"auto"`:
            exact up to 128 scalars, `"hutch++"` for more.
        tolerance: of the path, in units of the noise level (see `adaptive_ode`).
        error: of the integral of the traces, in nats.
        most: halvings of panels for any row in pursuit of `error`; what is left is in `solver_error`.
        flat: rows of the denoiser do not depend on their place: nodes are put beside each other in few large calls.
        differentiable: keep the graph for gradients in x and in whatever the denoiser depends on: memory for every
            evaluation. The steps and nodes are held fixed, which is right to the order of the error.

    Raises:
        ValueError: an unknown divergence; a denoiser whose Jacobian cannot be had; estimated traces without random
            numbers; x that requires gradients without `differentiable`.
        RuntimeError: the path cannot be solved.

    Example:
        >>> from pgen.algorithms.diffusion.mixture import Mixture
        >>> unit = Mixture(torch.zeros(1, 2, dtype=torch.float64), scale=1.0)
        >>> found = log_prob(torch.zeros(1, 2, dtype=torch.float64), Field(unit), 1e-3, 50.0)
        >>> found.value  # -log(2 pi)
        tensor([-1.8379], dtype=torch.float64)
    """
    if x.requires_grad and torch.is_grad_enabled() and not differentiable:
        raise ValueError(
            "x requires gradients: expected differentiable=True to have them, or x.detach() to go without"
        )
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"got sigma_min={sigma_min} and sigma_max={sigma_max}; expected 0 < sigma_min < sigma_max"
        )
    if x.dim() == 1:  # numbers, as vectors of one
        inner = Field(lambda y, sigma: field.denoiser(y[:, 0], sigma).unsqueeze(1), field.streams)
        inner.draws = field.draws
        return log_prob(
            x.unsqueeze(1),
            inner,
            sigma_min,
            sigma_max,
            None if prior is None else lambda y: prior(y[:, 0]),
            divergence=divergence,
            tolerance=tolerance,
            error=error,
            most=most,
            flat=flat,
            differentiable=differentiable,
        )
    way = _divergence(divergence, x[0].numel())
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        law = matched(field, sigma_max, x).log_prob if prior is None else prior
        solved = adaptive_ode(x, sigma_min, sigma_max, field, 0.0, tolerance, noise_units=True, dense=True)
        path = solved.path
        assert path is not None
        correction, size, spent = _correction(path, field)
        traces = _Traces(path, field, way, flat, differentiable and torch.is_grad_enabled())
        low, high = math.log(sigma_min), math.log(sigma_max)
        panels = math.ceil((high - low) / _PANEL)
        total = integrate(traces, low, high, len(x), error=error, panels=panels, most=most)
        end = law(solved.x).cpu().double()
        value = end + x[0].numel() * (high - low) - total.value - correction
    return Result(
        value.to(x.dtype).to(x.device),
        None if total.variance is None else total.variance.sqrt(),
        total.freedom,
        total.disagreement + size,
        solved.evaluations + spent,
        traces.products,
    )


class _Traces:
    """Traces of the denoiser's Jacobian along a path, at any noise levels."""

    def __init__(self, path: Path, field: Field, way: Divergence, flat: bool, differentiable: bool) -> None:
        self.path, self.field, self.way, self.flat = path, field, way, flat
        self.jacobian = Jacobian(field.denoiser, differentiable=differentiable)
        self.event = path.x.shape[2:]
        self.each = way.products(math.prod(self.event))
        self.products = torch.zeros(path.x.shape[1], dtype=torch.long)

    def __call__(self, levels: Tensor, needed: Tensor) -> Values:
        """Traces at log noise levels `[N, B]`."""
        points = [self.path.at(level)[0] for level in levels]
        first, self.field.draws = self.field.draws, self.field.draws + 2 * len(levels)
        self.products += self.each * len(levels) * needed
        rows = needed.nonzero()[:, 0].to(points[0].device) if self.flat else None
        size = 1
        if rows is not None:
            size = max(1, _FLAT // (len(rows) * points[0][0].numel() * self.each))
        found = []
        for begin in range(0, len(levels), size):
            nodes = range(begin, min(begin + size, len(levels)))
            x = torch.cat([points[n] if rows is None else points[n][rows] for n in nodes])
            level = torch.cat([levels[n] if rows is None else levels[n][needed] for n in nodes])
            product = self.jacobian.at(x, level.exp().to(x.dtype).to(x.device))
            found.append(self.way.trace(product, self._noise(nodes, first, x, rows), x))
        freedom = found[0].freedom
        value = self._spread([trace.value for trace in found], levels, needed)
        if freedom is None:
            return Values(value)
        variance = self._spread(
            [trace.variance for trace in found if trace.variance is not None], levels, needed
        )
        return Values(value, variance, freedom)

    def _noise(self, nodes: range, first: int, like: Tensor, rows: Tensor | None) -> Noise:
        """Fresh normal numbers of every row for these nodes: each node has two draws of its own."""
        taken = 0

        def noise(count: int) -> Tensor:
            nonlocal taken
            taken += 1
            if self.field.streams is None:
                raise ValueError(
                    "estimated traces draw random directions, and the field has none; expected "
                    "Field(denoiser, Streams(seed, rows=len(x))), or divergence='exact'"
                )
            drawn = [
                self.field.streams.normal(first + 2 * node + taken, (count, *self.event), like)
                for node in nodes
            ]
            drawn = [part if rows is None else part[rows] for part in drawn]
            return torch.cat(drawn).movedim(1, 0)

        return noise

    def _spread(self, parts: list[Tensor], levels: Tensor, needed: Tensor) -> Tensor:
        """Values of nodes as `[N, B]`, 0 for rows that were left out."""
        found = torch.cat(parts).cpu().double()
        if not self.flat:
            return found.reshape(levels.shape)
        return torch.zeros_like(levels).masked_scatter(needed.expand_as(levels), found)


def _correction(path: Path, field: Field) -> tuple[Tensor, Tensor, Tensor]:
    """The last term of the formula by Lobatto's rule on every step, its size, and the evaluations: each `[B]`."""
    moved = path.width != 0
    order = moved.int().argsort(dim=0, descending=True, stable=True)  # each row's own steps come first
    steps = moved.sum(0)
    terms = []
    for index in order[: int(steps.max())]:
        start = path.start.gather(0, index.unsqueeze(0))[0]
        width = path.width.gather(0, index.unsqueeze(0))[0]
        term = torch.zeros_like(width)
        for node, weight in _LOBATTO:
            x, change = path.within(index, torch.full_like(width, node))
            sigma = (start + node * width).exp()
            denoised = field(x, sigma)
            level = per_row(sigma.to(x.dtype).to(x.device), x)
            score = (denoised - x) / level**2
            off = change - (x - denoised)
            term = term + weight * width * (score * off).reshape(len(x), -1).sum(1).cpu().double()
        terms.append(term)
    total = torch.stack(terms)
    return total.sum(0), total.detach().abs().sum(0), len(_LOBATTO) * steps


def _divergence(divergence: Divergence | str, d: int) -> Divergence:
    """A way to the trace by its name."""
    if not isinstance(divergence, str):
        return divergence
    named: dict[str, Divergence] = {
        "exact": Exact(),
        "hutchinson": Hutchinson(),
        "hutch++": HutchPP(),
        "auto": Exact() if d <= _SMALL else HutchPP(),
    }
    if divergence not in named:
        raise ValueError(
            f"divergence={divergence!r}: expected {', '.join(map(repr, named))}, or an object with `trace`"
        )
    return named[divergence]
