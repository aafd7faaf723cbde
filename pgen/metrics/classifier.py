"""The classifier two-sample test: can a network tell drawn rows from real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from pgen.errors import OptionError
from pgen.metrics.two_sample import _flat, _generator


@dataclass(frozen=True)
class Classified:
    """How well a classifier told two samples apart on rows that it had not seen.

    Attributes:
        accuracy: share of rows told right, both samples counting equally; 0.5 is guessing.
        stderr: standard error of that share.
        p_value: chance of so high a share under one law, by the normal approximation to the binomial. A little
            too small, as folds share rows (7 % of comparisons under one law are below 0.05): where the size of
            a test matters, use `two_sample_test`, which is exact.
    """

    accuracy: float
    stderr: float
    p_value: float


def c2st(
    x: Tensor, y: Tensor, *, hidden: int = 64, folds: int = 5, steps: int = 200, seed: int = 0
) -> Classified:
    """Classifier two-sample test, cross-validated (Lopez-Paz and Oquab 2017).

    Every row is told by a classifier that was trained on the other folds; all folds train at once. Rows are
    standardised. Sees differences that a kernel does not, and says in one number how far apart the samples
    are: 0.5 where they cannot be told apart, 1.0 where they always can.

    Args:
        x: sample, shape `[n, ...]`; flattened, of any dtype.
        y: sample, shape `[m, ...]`; if one sample is longer, its first rows are used.
        hidden: units of the hidden layer; 0 for logistic regression.
        folds: parts of the data, each of which is held out once.
        steps: full-batch steps of Adam.
        seed: of the folds and of the first weights.

    Raises:
        DataError: fewer than two rows, rows of different sizes, or values that are not finite.
        OptionError: fewer than two folds, or more than rows.

    >>> x = torch.linspace(0.0, 1.0, 50)[:, None]
    >>> c2st(x, x + 2.0).accuracy > 0.9
    True
    """
    a, b = _flat(x, y)
    n = min(len(a), len(b))
    if not 2 <= folds <= n:
        raise OptionError(f"c2st(folds={folds}) on {n} rows of each sample: expected 2 to {n} folds")
    generator = _generator(a, seed)
    rows, labels = torch.cat([a[:n], b[:n]]), torch.cat([a.new_zeros(n), a.new_ones(n)])
    # A fold holds as many rows of one sample as of the other, so that guessing is right half of the time.
    fold = torch.cat([torch.randperm(n, generator=generator, device=a.device) % folds for _ in range(2)])
    held_out = fold[None] == torch.arange(folds, device=a.device)[:, None]
    rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)
    logits = _train(rows, labels, (~held_out).to(rows), hidden, steps, generator)
    right = ((logits > 0) == labels.bool()) & held_out
    count, total = int(right.sum()), 2 * n
    accuracy = count / total
    z = (count - 0.5 - total / 2) / math.sqrt(total / 4)
    return Classified(
        accuracy, math.sqrt(accuracy * (1 - accuracy) / total), 0.5 * math.erfc(z / math.sqrt(2))
    )


def _train(
    rows: Tensor, labels: Tensor, weight: Tensor, hidden: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Logits `[folds, N]` of one classifier for each fold, each trained on rows of weight one."""
    folds, features = len(weight), rows.shape[1]

    def drawn(inputs: int, outputs: int) -> Tensor:
        scale = 1 / math.sqrt(inputs)
        noise = torch.randn(folds, inputs, outputs, generator=generator, dtype=rows.dtype, device=rows.device)
        return (scale * noise).requires_grad_()

    def zeros(outputs: int) -> Tensor:
        return rows.new_zeros(folds, 1, outputs).requires_grad_()

    widths = [features, hidden, 1] if hidden else [features, 1]
    layers = [(drawn(i, o), zeros(o)) for i, o in pairwise(widths)]

    def classify() -> Tensor:
        x = rows.expand(folds, *rows.shape)
        for k, (matrix, bias) in enumerate(layers):
            x = torch.baddbmm(bias, F.silu(x) if k else x, matrix)
        return x.squeeze(-1)

    with torch.enable_grad():
        optimizer = torch.optim.AdamW([t for layer in layers for t in layer], lr=1e-2, weight_decay=1e-2)
        for _ in range(steps):
            losses = F.binary_cross_entropy_with_logits(
                classify(), labels.expand(folds, -1), weight=weight, reduction="none"
            )
            optimizer.zero_grad()
            (losses.sum(-1) / weight.sum(-1)).sum().backward()
            optimizer.step()
    return classify().detach()
