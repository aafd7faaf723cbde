"""Distances between two samples that need no density, and the test of whether they came from one law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgen.errors import DataError, OptionError

Kernel = Literal["gaussian", "energy"]


@dataclass(frozen=True)
class TwoSampleTest:
    """The outcome of a test of "both samples came from one law".

    Attributes:
        distance: the observed statistic.
        p_value: how often a random relabelling of the rows gives as much: uniform, or greater, under one law.
        permutations: how many relabellings were tried.
    """

    distance: float
    p_value: float
    permutations: int


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Tensor:
    r"""Squared maximum mean discrepancy, unbiased, with a Gaussian kernel (Gretton et al. 2012).

    .. math:: \text{MMD}^2 = \mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\,\mathbb{E}\,k(x, y),
        \qquad k(a, b) = \exp\big(-\|a - b\|^2 / 2 h^2\big)

    Zero on average where the laws are equal, and then negative about half of the time.

    Args:
        x: sample, shape `[n, ...]`; flattened, of any dtype.
        y: sample, shape `[m, ...]`.
        bandwidth: the kernel's h; None for the median distance between rows of both samples.

    Raises:
        DataError: fewer than two rows, rows of different sizes, or values that are not finite.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> bool(mmd(x, x + 5.0) > 0.5)
    True
    """
    a, b = _flat(x, y)
    return _statistic(_kernel(torch.cat([a, b]), "gaussian", bandwidth), _first(len(a), len(b), a))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared energy distance, unbiased: the MMD of minus the distance (Székely and Rizzo 2004).

    .. math:: 2\,\mathbb{E}\|x - y\| - \mathbb{E}\|x - x'\| - \mathbb{E}\|y - y'\|

    Args:
        x: sample, shape `[n, ...]`; flattened, of any dtype.
        y: sample, shape `[m, ...]`.

    Raises:
        DataError: fewer than two rows, rows of different sizes, or values that are not finite.

    >>> energy_distance(torch.tensor([[0.0], [0.0]]), torch.tensor([[3.0], [3.0]]))
    tensor(6.)
    """
    a, b = _flat(x, y)
    return _statistic(_kernel(torch.cat([a, b]), "energy", None), _first(len(a), len(b), a))


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0) -> Tensor:
    r"""Sliced Wasserstein-2 distance: the root of the mean squared distance of projections on random lines.

    .. math:: SW_2^2 = \mathbb{E}_\theta \int_0^1 \big(F^{-1}_{\theta \cdot x}(q) - F^{-1}_{\theta \cdot
    y}(q)\big)^2 dq

    Exact on every line, also for samples of different sizes. Positive even where the laws are equal, by an
    amount that shrinks with the samples: compare it with its value between two samples of the truth (Bonneel
    et al. 2015).

    Args:
        x: sample, shape `[n, ...]`; flattened, of any dtype.
        y: sample, shape `[m, ...]`.
        projections: random lines.
        seed: of the lines.

    Raises:
        DataError: fewer than two rows, rows of different sizes, or values that are not finite.

    >>> sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]))
    tensor(2.)
    """
    a, b = _flat(x, y)
    lines = torch.randn(
        a.shape[1], projections, generator=_generator(a, seed), dtype=a.dtype, device=a.device
    )
    lines = lines / lines.norm(dim=0)
    p, q = (a @ lines).sort(0).values, (b @ lines).sort(0).values
    # Quantile functions are steps: the levels at which either one jumps cut [0, 1] into intervals of
    # constancy.
    jumps = [torch.arange(1, len(s) + 1, device=a.device, dtype=torch.float64) / len(s) for s in (p, q)]
    levels = torch.cat(jumps).sort().values
    widths = torch.diff(levels, prepend=levels.new_zeros(1))
    middle = levels - widths / 2
    i, j = ((middle * len(s)).long().clamp_max(len(s) - 1) for s in (p, q))
    squares = ((p[i] - q[j]).square() * widths[:, None].to(a)).sum(0)
    return squares.mean().sqrt()


def two_sample_test(
    x: Tensor, y: Tensor, *, kernel: Kernel = "gaussian", permutations: int = 500, seed: int = 0
) -> TwoSampleTest:
    """Whether two samples came from one law, by relabelling rows at random.

    Under one law all labellings are equally likely, so the p-value is at most `alpha` with probability at
    most `alpha`, for samples of any size. All relabellings are computed at once, from one matrix of kernel
    values.

    Args:
        x: sample, shape `[n, ...]`; flattened, of any dtype.
        y: sample, shape `[m, ...]`.
        kernel: `"gaussian"` for `mmd` with the median bandwidth, `"energy"` for `energy_distance`.
        permutations: relabellings; the least p-value is `1 / (permutations + 1)`.
        seed: of the relabellings.

    Raises:
        DataError: fewer than two rows, rows of different sizes, or values that are not finite.
        OptionError: no permutations, or another kernel.

    >>> x = torch.arange(20.0)[:, None]
    >>> two_sample_test(x, x + 100.0).p_value < 0.01
    True
    """
    if permutations < 1 or kernel not in ("gaussian", "energy"):
        raise OptionError(
            f"two_sample_test(kernel={kernel!r}, permutations={permutations}): expected 'gaussian' or "
            "'energy' and at least 1"
        )
    a, b = _flat(x, y)
    values = _kernel(torch.cat([a, b]), kernel, None)
    first = _first(len(a), len(b), a)
    noise = torch.rand(permutations, len(first), generator=_generator(a, seed), device=a.device)
    relabelled = first[noise.argsort(-1)]
    observed, others = _statistic(values, first), _statistic(values, relabelled)
    # Equal up to rounding counts as equal: labellings that swap identical rows must not seem less extreme.
    slack = 1e-6 * values.abs().max()
    as_much = int((others >= observed - slack).sum())
    return TwoSampleTest(float(observed), (1 + as_much) / (1 + permutations), permutations)


def _statistic(kernel: Tensor, first: Tensor) -> Tensor:
    """Unbiased MMD of labellings `[..., N]` (one: the first sample), from a kernel matrix `[N, N]`."""
    second = 1 - first
    n, m = first.sum(-1), second.sum(-1)
    own = kernel.diagonal()
    heard = first @ kernel
    within = (heard * first).sum(-1) - first @ own
    across = (heard * second).sum(-1)
    other = ((second @ kernel) * second).sum(-1) - second @ own
    return within / (n * (n - 1)) + other / (m * (m - 1)) - 2 * across / (n * m)


def _kernel(rows: Tensor, kernel: Kernel, bandwidth: float | None) -> Tensor:
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    if kernel == "energy":
        return -distance
    if bandwidth is not None and not bandwidth > 0:
        raise OptionError(
            f"mmd(bandwidth={bandwidth}): expected a positive number, or None for the median distance"
        )
    apart = distance[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]
    width = apart.median() if bandwidth is None else torch.as_tensor(bandwidth).to(rows)
    return torch.exp(-0.5 * (distance / width.clamp_min(torch.finfo(rows.dtype).tiny)).square())


def _first(n: int, m: int, like: Tensor) -> Tensor:
    return torch.cat([like.new_ones(n), like.new_zeros(m)])


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(seed)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples as matrices of floating-point numbers on one device."""
    a, b = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None], y.detach()
    b = b.flatten(1) if b.ndim > 1 else b[:, None]
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise DataError(
            f"two samples of shapes {tuple(x.shape)} and {tuple(y.shape)}: expected at least two rows each, "
            "of one size"
        )
    dtype = a.dtype if a.is_floating_point() else torch.get_default_dtype()
    a, b = a.to(dtype), b.to(a.device, dtype)
    if not math.isfinite(float(a.sum() + b.sum())):
        raise DataError(
            "two samples: some values are not finite; leave those rows out, or look at why they were drawn"
        )
    return a, b
