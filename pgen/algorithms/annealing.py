r"""The evidence, and posterior draws, by walking from a reference to the target in small steps of temperature.

On the geometric path of `path`, from a normalised reference to a target with normalising constant Z:

    annealed importance sampling   chains go up a fixed ladder; their weights average to Z, so the mean log weight is
                                   a lower bound on log Z. From posterior draws down the same ladder: an upper bound.
    tempered SMC                   a cloud of particles goes up a ladder it makes itself, resampling on the way; what
                                   arrives are posterior draws

The ladder that tempered SMC finds, with the tuning of its kernel, serves annealed importance sampling (made `finer`),
whose weights are then unbiased without reservation: first adapt, then measure.

References:
    Annealed importance sampling (Neal, Statistics and Computing 2001), arXiv:physics/9803008. Sequential Monte Carlo
    samplers (Del Moral, Doucet & Jasra, JRSS-B 2006). Sandwiching the marginal likelihood using bidirectional Monte
    Carlo (Grosse, Ghahramani & Adams, 2015), arXiv:1511.02543. Toward automatic model comparison: an adaptive
    sequential Monte Carlo approach (Zhou, Johansen & Aston, JCGS 2016), arXiv:1303.3123.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel, Tuning
from pgen.algorithms.path import Cloud, Frames, Ladder, Path, Recorder, Walk, as_written, root
from pgen.algorithms.progress import followed


class Evidence(NamedTuple):
    """What weights say about log Z, in nats, `[]` each.

    Attributes:
        estimate: log of the mean weight (of its inverse, for weights from above); biased by about `stderr^2 / 2`.
        stderr: standard error of the estimate, by the delta method; worth little above 0.5 or so.
        bound: mean of the log weights: its expectation is below log Z (above, for weights from above).
        bound_stderr: standard error of the bound.
    """

    estimate: Tensor
    stderr: Tensor
    bound: Tensor
    bound_stderr: Tensor


def evidence_below(log_weights: Tensor) -> Evidence:
    """log Z from independent `[C]` weights whose expectation is Z; of several, from `[C, R]`.

    Example:
        >>> evidence_below(torch.tensor([1.0, 3.0]).log())
        Evidence(estimate=tensor(0.6931), stderr=tensor(0.5000), bound=tensor(0.5493), bound_stderr=tensor(0.5493))
    """
    root = math.sqrt(len(log_weights))
    estimate = log_weights.logsumexp(0) - math.log(len(log_weights))
    stderr = (log_weights - estimate).exp().std(0) / root
    return Evidence(estimate, stderr, log_weights.mean(0), log_weights.std(0) / root)


def evidence_above(log_weights: Tensor) -> Evidence:
    """log Z from independent `[C]` weights whose inverse has expectation 1 / Z, such as those of `descend`."""
    below = evidence_below(-log_weights)
    return Evidence(-below.estimate, below.stderr, -below.bound, below.bound_stderr)


# --- annealed importance sampling ---


class Annealed(NamedTuple):
    """Chains that went along a ladder.

    Attributes:
        position: where they arrived, `[C, d]`.
        log_weight: `[C]`; see `evidence_below` and `evidence_above`.
        accept: mean acceptance at each rung in the order of visits, `[n]`.
    """

    position: Tensor
    log_weight: Tensor
    accept: Tensor


@dataclass(frozen=True)
class AnnealedImportance:
    r"""Annealed importance sampling over C chains at once, in both directions.

    .. math:: \log w = \sum_{t=1}^{n} (\beta_t - \beta_{t-1})\, \log\frac{\text{target}(q_t)}{\text{reference}(q_t)}

    where going up, q_1 is drawn from the reference and q_{t+1} by the kernel at beta_t; going down, the chain starts
    with a draw of the posterior and the kernel at beta_t gives q_t.

    Args:
        kernel: any kernel that leaves its target invariant; *reversible* for the way down (random walk, MALA, HMC and
            NUTS with fresh momenta are).
        moves: steps of the kernel at each temperature.
    """

    kernel: Kernel
    moves: int = 1

    def __post_init__(self) -> None:
        """Check the number of moves."""
        _check_at_least("moves", self.moves, 1)

    def ascend(self, path: Path, ladder: Ladder, chains: int, *, record: Recorder = as_written) -> Annealed:
        """From the reference to the target: `E[exp(log_weight)] = Z`, so `E[log_weight] <= log Z`.

        Args:
            path: with a reference and its sampler.
            ladder: fixed beforehand.
            chains: C.
            record: what turns the moves at one temperature into something faster.
        """
        walk = record(Walk(self.kernel, path, self.moves))
        cloud = path.evaluate(_sampler(path)(chains))
        log_weight = torch.zeros_like(cloud.ratio)
        accepts = list[Tensor]()
        for t in followed(range(1, len(ladder.beta)), "annealing up"):
            log_weight = log_weight + (ladder.beta[t] - ladder.beta[t - 1]) * cloud.ratio
            cloud, _, accept = walk(cloud, ladder.beta[t], ladder.tuned(t))
            accepts.append(accept)
        return Annealed(cloud.position, log_weight, torch.stack(accepts))

    def descend(
        self, path: Path, ladder: Ladder, position: Tensor, *, record: Recorder = as_written
    ) -> Annealed:
        """From exact posterior draws `[C, d]` to the reference: `E[exp(-log_weight)] = 1 / Z`, `E[log_weight] >= log Z`.

        Data simulated from the program come with an exact draw of their posterior: the latents that made them.
        """
        walk = record(Walk(self.kernel, path, self.moves))
        cloud = path.evaluate(position)
        log_weight = torch.zeros_like(cloud.ratio)
        accepts = list[Tensor]()
        for t in followed(range(len(ladder.beta) - 1, 0, -1), "annealing down"):
            cloud, _, accept = walk(cloud, ladder.beta[t], ladder.tuned(t))
            log_weight = log_weight + (ladder.beta[t] - ladder.beta[t - 1]) * cloud.ratio
            accepts.append(accept)
        return Annealed(cloud.position, log_weight, torch.stack(accepts))


# --- tempered SMC ---


class Particles(NamedTuple):
    """G islands of N particles on their way up.

    Attributes:
        cloud: `[G N]` particles, island by island.
        log_weight: normalised within each island, `[G, N]`.
        log_evidence: of the density reached so far, by island, `[G]`.
        beta: the inverse temperature reached, `[]`.
        tuning: of the kernel there.
        accept: mean acceptance there, `[]`.
    """

    cloud: Cloud
    log_weight: Tensor
    log_evidence: Tensor
    beta: Tensor
    tuning: Tuning
    accept: Tensor

    @property
    def position(self) -> Tensor:
        """`[G, N, d]`."""
        return self.cloud.position.unflatten(0, self.log_weight.shape)


class Arrived(NamedTuple):
    """What tempered SMC ends with.

    Attributes:
        position: equally weighted posterior draws within each island, `[G, N, d]`.
        log_evidence: of each island, `[G]`; `evidence_below` pools them.
        ladder: the temperatures and tunings that were found.
        accept: mean acceptance at each temperature, `[n]`.
    """

    position: Tensor
    log_evidence: Tensor
    ladder: Ladder
    accept: Tensor

    def draws(self) -> Tensor:
        """All `[G N, d]` draws, islands drawn by their evidence."""
        islands, particles, _ = self.position.shape
        log_weight = (self.log_evidence - math.log(particles)).unsqueeze(1).expand(islands, particles)
        return self.position.flatten(0, 1)[systematic(log_weight.reshape(1, -1)).squeeze(0)]


@dataclass(frozen=True)
class TemperedSMC:
    """Sequential Monte Carlo along the path, its temperatures, scale and step size found on the way.

    The next temperature is where the conditional effective sample size falls to `keep`. An island whose effective
    sample size falls below `threshold` is resampled (systematically), as is every island at the end. Islands share
    temperatures and tuning, nothing else: their spread, if there are a dozen or more, tells the error of the evidence.

    The kernel must leave its target invariant. Its scale is the square root of the covariance of the *other* islands:
    with that of its own, an island's particles would keep the errors that the scale took from them, and the evidence
    would be nats too high (in 50 dimensions with thousands of particles). The step size follows the acceptance.

    Args:
        kernel: what moves the particles.
        particles: N, in each island.
        islands: G.
        moves: steps of the kernel at each temperature.
        accept: acceptance to adapt the step size to: 0.234 for a random walk, 0.574 for MALA, 0.8 for HMC.
        keep: fraction of the conditional effective sample size kept from one temperature to the next, in (0, 1).
        threshold: fraction of the effective sample size to resample below, in (0, 1].
        dense: whether the scale is a Cholesky factor, not standard deviations; None: where there are ten particles to
            a dimension.
        step_size: to begin with.
        length: of trajectories, in whitened time, for kernels whose trajectories have one.
        longest: temperatures after which to give up.

    Raises:
        ValueError: a setting is out of its range, or the path has no sampler.
        RuntimeError: `run` did not arrive.
    """

    kernel: Kernel
    particles: int = 256
    islands: int = 16
    moves: int = 5
    accept: float = 0.574
    keep: float = 0.8
    threshold: float = 0.5
    dense: bool | None = None
    step_size: float = 0.5
    length: float = math.pi / 2
    longest: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("particles", "islands", "moves", "longest"):
            _check_at_least(name, getattr(self, name), 2 if name == "particles" else 1)
        for name in ("accept", "keep", "threshold"):
            if not 0 < getattr(self, name) <= (1 if name == "threshold" else 1 - 1e-6):
                raise ValueError(f"{name} is a fraction between 0 and 1, got {getattr(self, name)}")

    def run(self, path: Path, *, record: Recorder = as_written) -> Arrived:
        """From the reference to the target.

        Args:
            path: with a reference and its sampler.
            record: what turns a step into something faster.
        """
        step = record(lambda state: self.step(state, path))
        state = self.init(path)
        betas, accepts = [state.beta], list[Tensor]()
        tunings = list[Tuning]()
        while bool(state.beta < 1):
            if len(tunings) == self.longest:
                raise RuntimeError(
                    f"tempered SMC is at inverse temperature {float(state.beta):.3g} after {self.longest} steps; the "
                    "reference is too far from the target: take a closer one (a variational fit), lower keep= or "
                    "raise longest="
                )
            state = step(state)
            betas.append(state.beta)
            tunings.append(state.tuning)
            accepts.append(state.accept)
        ladder = Ladder(
            torch.stack(betas), Tuning(*(torch.stack(fields) for fields in zip(*tunings, strict=True)))
        )
        return Arrived(state.position, state.log_evidence, ladder, torch.stack(accepts))

    def init(self, path: Path) -> Particles:
        """The cloud at the reference."""
        cloud = path.evaluate(_sampler(path)(self.islands * self.particles))
        new = cloud.ratio.new_tensor
        level = cloud.ratio.new_full((self.islands, self.particles), -math.log(self.particles))
        tuning = Tuning(new(self.step_size), self._scales(cloud.position, level)[0], new(self.length))
        return Particles(cloud, level, torch.zeros_like(level[:, 0]), new(0.0), tuning, new(1.0))

    def step(self, state: Particles, path: Path) -> Particles:
        """One temperature further: reweight, resample, move. Straight-line code, except in some kernels."""
        cloud, log_weight, log_evidence, beta, tuning, _ = state
        ratio = cloud.ratio.reshape(log_weight.shape)
        there = next_beta(ratio, log_weight, beta, self.keep)
        log_weight = log_weight + (there - beta) * ratio
        increment = log_weight.logsumexp(1, keepdim=True)
        log_evidence, log_weight = log_evidence + increment.squeeze(1), log_weight - increment

        size = (-(2 * log_weight).logsumexp(1, keepdim=True)).exp()
        poor = (size < self.threshold * self.particles) | (there >= 1)
        stay = torch.arange(self.particles, device=size.device)
        chosen = torch.where(poor, systematic(log_weight), stay)
        first = self.particles * torch.arange(self.islands, device=size.device).unsqueeze(1)
        cloud = cloud.take((first + chosen).reshape(-1))
        log_weight = torch.where(poor, -math.log(self.particles), log_weight)

        pooled, frames = self._scales(cloud.position, log_weight)
        walk = Walk(self.kernel, frames.path(path), self.moves, self.accept)
        tuning = tuning._replace(scale=torch.ones_like(cloud.position[0]))
        moved, tuning, accept = walk.move(frames.cloud(cloud), there, tuning)
        cloud = path.evaluate(frames.push(moved))
        return Particles(cloud, log_weight, log_evidence, there, tuning._replace(scale=pooled), accept)

    def _scales(self, position: Tensor, log_weight: Tensor) -> tuple[Tensor, Frames]:
        """The scale of the whole cloud; and for each island, that of all others."""
        size = position.shape[1]
        dense = size * 10 <= len(position) if self.dense is None else self.dense
        rows, weight = position.unflatten(0, log_weight.shape), log_weight.exp().unsqueeze(2)
        rows = rows - rows.mean((0, 1))
        first = (weight * rows).sum(1)
        second = (weight * rows).mT @ rows if dense else (weight * rows.square()).sum(1)

        def scale(first: Tensor, second: Tensor, islands: int) -> Tensor:
            outer = first.unsqueeze(-1) * first.unsqueeze(-2) if dense else first.square()
            return root(second - outer, islands * self.particles, dense)

        pooled = scale(first.mean(0), second.mean(0), self.islands)
        others = max(self.islands - 1, 1)
        if self.islands > 1:
            first, second = ((part.sum(0) - part) / others for part in (first, second))
        frames = scale(first, second, others)
        return pooled, Frames(frames if dense else frames.unsqueeze(1), dense)


def next_beta(ratio: Tensor, log_weight: Tensor, beta: Tensor, keep: float) -> Tensor:
    r"""The inverse temperature, up to 1, at which the conditional effective sample size has fallen to `keep`.

    .. math:: \mathrm{CESS} / N = (\sum_i W_i w_i)^2 / \sum_i W_i w_i^2, \qquad w_i = \exp(\delta\, \text{ratio}_i)

    over all islands, as a fraction of the particles that are not at once lost. By bisection.

    Args:
        ratio: log ratio of target and reference, `[G, N]`.
        log_weight: normalised log weights W, `[G, N]`.
        beta: the present inverse temperature, `[]`.
        keep: in (0, 1).

    Example:
        >>> ratio = torch.tensor([[0.0, 3.0]])
        >>> next_beta(ratio, torch.full((1, 2), -math.log(2)), torch.tensor(0.0), 0.8)
        tensor(0.3662)
    """
    lost = ratio < -0.5 * math.sqrt(torch.finfo(ratio.dtype).max)  # where the target is zero; see `Path`
    alive = torch.where(lost, 0.0, log_weight.exp()).sum(1)

    def kept(step: Tensor) -> Tensor:
        moved = log_weight + step * ratio
        cess = (2 * moved.logsumexp(1) - (moved + step * ratio).logsumexp(1)).exp()
        return torch.where(alive > 0, cess, 0.0).sum() / alive.sum()

    low, high = torch.zeros_like(beta), 1 - beta
    for _ in range(40):
        middle = (low + high) / 2
        good = kept(middle) >= keep
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(kept(1 - beta) >= keep, 1.0, (beta + high).clamp(max=1.0))


def systematic(log_weight: Tensor) -> Tensor:
    """Indices drawn by normalised weights with one uniform number for each row, `[G, N]` to `[G, N]`.

    An entry of weight w is drawn floor(N w) or ceil(N w) times.
    """
    islands, particles = log_weight.shape
    ends = log_weight.exp().cumsum(1)
    comb = torch.arange(particles, dtype=ends.dtype, device=ends.device)
    marks = (comb + torch.rand(islands, 1, dtype=ends.dtype, device=ends.device)) / particles
    # The last end is one but for rounding; made exactly so, no entry of weight zero is drawn.
    return torch.searchsorted(ends / ends[:, -1:], marks, right=True).clamp(max=particles - 1)


def cloud_scale(position: Tensor, weight: Tensor, dense: bool) -> Tensor:
    """Square root of the covariance of `[S, d]` points with normalised weights `[S]`: `[d]` or Cholesky `[d, d]`."""
    centred = position - weight @ position
    weighted = centred * weight.unsqueeze(1)
    covariance = weighted.mT @ centred if dense else (weighted * centred).sum(0)
    return root(covariance, len(position), dense)


def _sampler(path: Path) -> Callable[[int], Tensor]:
    if path.sample is None or path.reference is None:
        raise ValueError(
            "annealing starts from draws of a normalised reference: give Path(target, reference=, sample=), for "
            "example with `gaussian(mean, scale)`"
        )
    return path.sample


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
