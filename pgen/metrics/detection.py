"""Scores that tell what belongs from what does not, and probabilities that mean what they say."""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.errors import OptionError


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    r"""The area under the curve of true against false alarms: $P(s_\mathrm{in} > s_\mathrm{out}) + P(s_\mathrm{in} = s_\mathrm{out}) / 2$.

    1/2 is chance, 1 is a score that keeps the two apart. Scores need no common scale: those of log densities may lack their
    constant.

    Args:
        inside: scores of what belongs, `[n]`: high where it belongs well.
        outside: scores of what does not, `[m]`.

    Raises:
        OptionError: one of them is empty, or not a number.

    References:
        Hanley & McNeil, The meaning and use of the area under a receiver operating characteristic curve, Radiology 143, 1982.

    >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    tensor(0.8750, dtype=torch.float64)
    """
    inside, outside = inside.detach().reshape(-1).double(), outside.detach().reshape(-1).double()
    for name, scores in (("inside", inside), ("outside", outside)):
        if not scores.numel() or bool(scores.isnan().any()):
            raise OptionError(
                f"auroc({name}=...): expected one score or more, all of them numbers; got {scores.numel()}, "
                f"{int(scores.isnan().sum())} of them NaN"
            )
    low = outside.sort().values
    below = torch.searchsorted(low, inside, right=False)
    upto = torch.searchsorted(low, inside, right=True)
    return (below + upto).double().mean() / (2 * len(low))


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    r"""Expected calibration error: how far confidence is from accuracy, over bins of equal width of the confidence.

    .. math:: \sum_b \frac{n_b}{n} | \mathrm{accuracy}_b - \mathrm{confidence}_b |

    Args:
        probs: probabilities of the classes, `[n, classes]`.
        labels: which of them it is, `[n]`.
        bins: of the confidence, between 0 and 1.

    Raises:
        OptionError: shapes that do not belong together, or rows that do not sum to 1.

    References:
        Guo, Pleiss, Sun & Weinberger, On calibration of modern neural networks, ICML 2017.

    Example:
        Sure to 0.9 and right once in two.

        >>> calibration_error(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([0, 0]))
        tensor(0.4000, dtype=torch.float64)
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels) or bins < 1:
        raise OptionError(
            f"calibration_error: expected probs [n, classes], labels [n] and bins of at least 1; got {tuple(probs.shape)}, "
            f"{tuple(labels.shape)} and {bins}"
        )
    probs = probs.detach().double()
    if bool(((probs.sum(1) - 1).abs() > 1e-3).any()) or bool((probs < 0).any()):
        raise OptionError(
            "calibration_error: expected rows of probabilities that sum to 1; give logits.softmax(-1)"
        )
    sure, guess = probs.max(1)
    gap = (guess == labels).double() - sure
    place = (sure * bins).long().clamp(max=bins - 1)
    return gap.new_zeros(bins).index_add(0, place, gap).abs().sum() / len(labels)
