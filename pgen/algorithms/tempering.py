r"""Parallel tempering: chains at T temperatures that trade places, so that the cold ones hear of far modes.

Every chain of the user's is a column of T replicas on the path of `path`, from hot (beta_0) to cold (beta = 1), and
all C T of them take a step of one kernel in one batch. Then neighbours swap with probability

.. math:: \min\{1, \exp[(\beta_{t+1} - \beta_t)(\ell_t - \ell_{t+1})]\}, \qquad
          \ell = \log\frac{\text{target}}{\text{reference}}

even pairs at one step and odd pairs at the next. That order is not reversible: replicas drift from end to end in
about T steps, where random pairs would diffuse in T^2. What limits the round trips is the sum of the rejection
rates, the communication barrier, which a ladder only distributes; best is evenly.

References:
    Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed, Bouchard-Côté, Deligiannidis &
    Doucet, JRSS-B 2021), arXiv:1905.02939. Deterministic even-odd swaps: Okabe, Kawata, Okamoto & Mikami (2001).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning
from pgen.algorithms.kernels.iterate import Step
from pgen.algorithms.path import Cloud, Path, Recorder, as_written, path_of


class Temperatures(NamedTuple):
    """The tuning of a tempered kernel.

    Attributes:
        beta: inverse temperatures, rising to 1, `[T]`.
        step_size: `[T]`.
        scale: standard deviations at each temperature, `[T, d]`.
        length: of trajectories, in whitened time of the coldest, `[]`.
    """

    beta: Tensor
    step_size: Tensor
    scale: Tensor
    length: Tensor


class Replicas(NamedTuple):
    """C columns of T replicas.

    Attributes:
        position: of the cold replicas, `[C, d]`.
        cloud: all replicas, hot to cold, each field `[C, T, ...]`.
        parity: whether odd pairs are to swap next, `[C]`.
        from_hot: whether the replica was last at the hot end, not at the cold one, `[C, T]`.
        trips: arrivals at the cold end from the hot one so far, `[C]`.
    """

    position: Tensor
    cloud: Cloud
    parity: Tensor
    from_hot: Tensor
    trips: Tensor


class TemperedInfo(NamedTuple):
    """The `Info` of the cold replicas, `[C]` each (evaluations: of the whole column), and of all temperatures.

    Attributes:
        accept: of the kernel.
        energy: see `Info`.
        diverging: see `Info`.
        evaluations: see `Info`.
        accepts: of the kernel at each temperature, `[C, T]`.
        rejection: probability of rejecting the swap of each pair of neighbours, tried or not, `[C, T - 1]`.
    """

    accept: Tensor
    energy: Tensor
    diverging: Tensor
    evaluations: Tensor
    accepts: Tensor
    rejection: Tensor


@dataclass(frozen=True)
class ParallelTempering:
    """A kernel made of a kernel: T temperatures of it, and swaps.

    The target is a `Path` (from its reference to its target) or a plain density (its powers). With a path that has a
    sampler, the hot replicas are drawn afresh from the reference at every step, so that every arrival at the cold end
    brings something independent; its `beta[0]` must stay 0.

    The inner kernel sees each replica in coordinates whitened by the scale and step size of its temperature: one step
    size then fits all, and any kernel will do. Momenta it keeps between steps are drawn anew.

    Args:
        kernel: what moves the replicas.
        temperatures: T.
        hottest: the lowest inverse temperature; above 0 for a plain density, whose powers must be integrable.
        moves: steps of the kernel between swaps.

    Raises:
        ValueError: a setting is out of its range.
    """

    kernel: Kernel
    temperatures: int = 8
    hottest: float = 0.0
    moves: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.temperatures < 2:
            raise ValueError(f"temperatures must be at least 2, got {self.temperatures}")
        if not 0 <= self.hottest < 1:
            raise ValueError(f"hottest is an inverse temperature in [0, 1), got {self.hottest}")
        if self.moves < 1:
            raise ValueError(f"moves must be at least 1, got {self.moves}")

    def untuned(self, position: Tensor, step_size: float = 0.1, length: float = 1.0) -> Temperatures:
        """Temperatures to begin with: cubes from 0, or a geometric sequence from `hottest`; unit scale."""
        count, new = self.temperatures, position.new_tensor
        grid = torch.linspace(0, 1, count, dtype=position.dtype, device=position.device)
        beta = grid**3 if self.hottest == 0 else self.hottest ** (1 - grid)
        ones = position.new_ones(count, position.shape[1])
        return Temperatures(beta, position.new_full((count,), step_size), ones, new(length))

    def init(self, position: Tensor, target: Path | LogDensity) -> Replicas:
        """Every replica of a column at its position `[C, d]`, but the hot one at the reference if it can be drawn."""
        path = path_of(target)
        if path.reference is None and self.hottest == 0:
            raise ValueError(
                "a plain density at inverse temperature 0 is flat and has no draws: give a Path with a reference, or "
                "ParallelTempering(hottest=0.01)"
            )
        chains, count = len(position), self.temperatures
        cloud = _evaluate(path, _refreshed(path, position.unsqueeze(1).expand(-1, count, -1)))
        from_hot = torch.arange(count, device=position.device).expand(chains, count) == 0
        parity = torch.zeros(chains, dtype=torch.long, device=position.device)
        return Replicas(position, cloud, parity, from_hot, torch.zeros_like(parity))

    def step(
        self, state: Replicas, tuning: Temperatures, target: Path | LogDensity
    ) -> tuple[Replicas, TemperedInfo]:
        """A step of every replica, then swaps."""
        path = path_of(target)
        chains, count, size = state.cloud.position.shape
        cold = tuning.step_size[-1]
        factor = tuning.scale * (tuning.step_size / cold).unsqueeze(1)
        factor = factor.expand(chains, count, size).reshape(-1, size)
        beta = tuning.beta.expand(chains, count).reshape(-1)

        def whitened(cloud: Cloud) -> tuple[Tensor, Tensor]:
            density, gradient = cloud.at(beta)
            return density, gradient * factor

        rows = Cloud(*(part.flatten(0, 1) for part in state.cloud))
        inner = self.kernel.init(rows.position / factor, lambda _: whitened(rows))
        common = Tuning(cold, torch.ones_like(factor[0]), tuning.length)
        accept, evaluations = torch.zeros_like(rows.ratio), torch.ones_like(rows.ratio)
        diverging = torch.zeros_like(rows.ratio, dtype=torch.bool)
        for _ in range(self.moves):
            inner, info = self.kernel.step(inner, common, lambda u: whitened(path.evaluate(u * factor)))
            accept, diverging = accept + info.accept / self.moves, diverging | info.diverging
            evaluations = evaluations + info.evaluations
        moved = (inner.position * factor).unflatten(0, (chains, count))
        cloud = _evaluate(path, _refreshed(path, moved))

        swapped, rejection = _swap(cloud, state.from_hot, tuning.beta, state.parity)
        cloud, from_hot = swapped
        trips = state.trips + from_hot[:, -1]
        arrived = torch.zeros_like(from_hot[:, :1])
        from_hot = torch.cat([~arrived, from_hot[:, 1:-1], arrived], 1)
        state = Replicas(cloud.position[:, -1], cloud, 1 - state.parity, from_hot, trips)
        accepts, diverging = (field.reshape(chains, count) for field in (accept, diverging))
        energy = -(cloud.base[:, -1] + tuning.beta[-1] * cloud.ratio[:, -1])
        evaluations = evaluations.reshape(chains, count).sum(1)
        return state, TemperedInfo(accepts[:, -1], energy, diverging[:, -1], evaluations, accepts, rejection)

    def warm_up(
        self,
        state: Replicas,
        tuning: Temperatures,
        target: Path | LogDensity,
        *,
        rounds: int = 8,
        accept: float = 0.574,
        record: Recorder = as_written,
    ) -> tuple[Replicas, Temperatures]:
        """Rounds of 2, 4, ..., 2^rounds steps; see `warm_round`."""
        for number in range(1, rounds + 1):
            state, tuning = self.warm_round(state, tuning, target, 2**number, accept=accept, record=record)
        return state, tuning

    def warm_round(
        self,
        state: Replicas,
        tuning: Temperatures,
        target: Path | LogDensity,
        steps: int,
        *,
        accept: float = 0.574,
        record: Recorder = as_written,
    ) -> tuple[Replicas, Temperatures]:
        """Some steps, at each of which the step sizes follow the acceptance; then ladder and scales as they say.

        Args:
            state: where to begin.
            tuning: what to begin with.
            target: see `step`.
            steps: how many.
            accept: acceptance to be had at every temperature: 0.234 for a random walk, 0.574 for MALA, 0.8 for HMC.
            record: what turns a step into something faster.
        """
        step = record(Step(cast(Any, self), cast(Any, target)))
        rejections, positions = list[Tensor](), list[Tensor]()
        for n in range(steps):
            state, info = step(state, tuning)
            tuning = follow(tuning, info, accept, gain=(n + 1) ** -0.5)
            rejections.append(info.rejection.mean(0))
            positions.append(state.cloud.position)
        seen = torch.stack(positions).flatten(0, 1)
        return state, retune(tuning, torch.stack(rejections).mean(0), seen.std(0))


# --- adapting the ladder ---


def follow(tuning: Temperatures, info: TemperedInfo, accept: float, gain: float) -> Temperatures:
    """Step sizes after one look at the acceptance: `log step += gain (seen - accept)`, temperature by temperature."""
    return tuning._replace(step_size=tuning.step_size * (gain * (info.accepts.mean(0) - accept)).exp())


def retune(tuning: Temperatures, rejection: Tensor, deviation: Tensor) -> Temperatures:
    """A ladder with even rejection rates, and scales as seen.

    Args:
        tuning: the present temperatures.
        rejection: mean rejection probability between neighbours, `[T - 1]`.
        deviation: standard deviations of the replicas, `[T, d]`.
    """
    least = torch.finfo(deviation.dtype).eps
    scale = torch.where(deviation > least, deviation, tuning.scale)
    # The same steps in the new units, read off at the new temperatures.
    step = tuning.step_size * (tuning.scale / scale).log().mean(1).exp()
    beta = even_beta(tuning.beta, rejection)
    step = interpolate(beta, tuning.beta, step.log()).exp()
    return Temperatures(beta, step, interpolate(beta, tuning.beta, scale.log()).exp(), tuning.length)


def even_beta(beta: Tensor, rejection: Tensor) -> Tensor:
    """Inverse temperatures `[T]` that cut the barrier, the cumulative rejection `[T - 1]` between them, evenly.

    Example:
        >>> even_beta(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.9, 0.3]))
        tensor([0.0000, 0.3333, 1.0000])
    """
    # A rate seen as zero may be small only; the barrier has to rise for its inverse to exist.
    least = 1e-3 / len(rejection)
    barrier = torch.cat([torch.zeros_like(rejection[:1]), rejection.clamp_min(least).cumsum(0)])
    even = torch.linspace(0, 1, len(beta), dtype=beta.dtype, device=beta.device) * barrier[-1]
    return torch.cat([beta[:1], interpolate(even, barrier, beta)[1:-1], beta[-1:]])


def round_trip_rate(rejection: Tensor) -> Tensor:
    r"""Round trips per step and column under even-odd swaps, `1 / (2 + 2 sum_t r_t / (1 - r_t))`, if replicas mixed at once.

    Example:
        >>> round_trip_rate(torch.tensor([0.5, 0.5]))
        tensor(0.1667)
    """
    return 1 / (2 + 2 * (rejection / (1 - rejection)).sum(-1))


def interpolate(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Values `[n, ...]` given at rising points `[n]`, read at `x` `[k]` by straight lines: `[k, ...]`."""
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    share = ((x - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share.reshape(-1, *[1] * (values.dim() - 1)))


# --- swaps ---


def swaps(ratio: Tensor, beta: Tensor, parity: Tensor) -> tuple[Tensor, Tensor]:
    """Who trades places among the pairs (t, t + 1) with t of this parity; and how likely every pair is to stay.

    Args:
        ratio: log ratio of target and reference at replicas, hot to cold, `[C, T]`.
        beta: inverse temperatures `[T]`.
        parity: 0 or 1, `[C]` or `[1]`.

    Returns:
        which replica comes to each temperature, `[C, T]`, and the rejection probability of all pairs, tried or not,
        `[C, T - 1]`.

    Example:
        >>> ratio = torch.tensor([[9.0, 1.0, 5.0]])
        >>> swaps(ratio, torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0]))[0]
        tensor([[1, 0, 2]])
    """
    gain = (beta[1:] - beta[:-1]) * (ratio[:, :-1] - ratio[:, 1:])
    probability = gain.clamp(max=0.0).exp()
    pair = torch.arange(len(beta) - 1, device=beta.device)
    trade = (torch.rand_like(probability) < probability) & (pair % 2 == parity.unsqueeze(1))
    edge = torch.zeros_like(trade[:, :1])
    index = torch.arange(len(beta), device=beta.device) + torch.cat([trade, edge], 1).long()
    return index - torch.cat([edge, trade], 1).long(), 1 - probability


def _swap(
    cloud: Cloud, from_hot: Tensor, beta: Tensor, parity: Tensor
) -> tuple[tuple[Cloud, Tensor], Tensor]:
    """Replicas, and where they come from, after the swaps; and the rejection probabilities."""
    index, rejection = swaps(cloud.ratio, beta, parity)

    def traded(part: Tensor) -> Tensor:
        return part.gather(1, index.reshape(index.shape + (1,) * (part.dim() - 2)).expand(part.shape))

    return (Cloud(*map(traded, cloud)), traded(from_hot)), rejection


def _evaluate(path: Path, position: Tensor) -> Cloud:
    shape = position.shape[:2]
    return Cloud(*(part.unflatten(0, shape) for part in path.evaluate(position.flatten(0, 1))))


def _refreshed(path: Path, position: Tensor) -> Tensor:
    """Positions `[C, T, d]` with the hot ones drawn afresh, where that can be done."""
    if path.sample is None:
        return position
    return torch.cat([path.sample(len(position)).unsqueeze(1), position[:, 1:]], 1)
