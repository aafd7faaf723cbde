r"""Thresholding: denoised values kept within the bounds that data have.

Where data lie in [low, high], so does the mean of any law over them: clipping the answers of a learned denoiser takes
errors away and adds none. Strong guidance drives many numbers out of bounds at once, and clipping these saturates them;
dynamic thresholding then shrinks the row as a whole.

References:
    Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, NeurIPS 2020 (clipping).
    Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, NeurIPS 2022, section
    2.3 (dynamic thresholding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row


def clipped(denoiser: Denoiser, low: float | Tensor, high: float | Tensor) -> Denoiser:
    """A denoiser whose answers lie within bounds (of shape `event`, or one for all numbers).

    Example:
        >>> clipped(lambda x, sigma: x, -1.0, 1.0)(torch.tensor([[-3.0, 0.5]]), torch.ones(1))
        tensor([[-1.0000, 0.5000]])
    """
    if bool((torch.as_tensor(low) >= torch.as_tensor(high)).any()):
        raise ValueError(f"clipped(low={low}, high={high}): expected low < high")

    def within(x: Tensor, sigma: Tensor) -> Tensor:
        answer = denoiser(x, sigma)
        return torch.clamp(answer, torch.as_tensor(low).to(answer), torch.as_tensor(high).to(answer))

    return within


def dynamic(denoiser: Denoiser, quantile: float = 0.995, bound: float = 1.0) -> Denoiser:
    r"""A denoiser whose answers are clipped to a quantile of their own sizes, and shrunk to the bound, row by row.

        s = max(bound, quantile of |D| over the row),    D <- clip(D, -s, s) bound / s

    Args:
        denoiser: of data in [-bound, bound].
        quantile: in (0, 1].
        bound: of the data.
    """
    if not 0 < quantile <= 1 or bound <= 0:
        raise ValueError(
            f"dynamic(quantile={quantile}, bound={bound}): expected 0 < quantile <= 1 and bound > 0"
        )

    def within(x: Tensor, sigma: Tensor) -> Tensor:
        answer = denoiser(x, sigma)
        sizes = answer.detach().abs().reshape(len(answer), -1)
        rank = max(1, round(quantile * sizes.shape[1]))  # torch.quantile refuses large rows
        scale = per_row(sizes.kthvalue(rank, dim=1).values.clamp(min=bound), answer)
        return torch.minimum(torch.maximum(answer, -scale), scale) * (bound / scale)

    return within
