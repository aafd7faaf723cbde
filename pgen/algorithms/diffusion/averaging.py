r"""Power-function averages of weights, and how to get others of them after training.

    average_t = int_0^t tau^g weights(tau) dtau / int_0^t tau^g dtau

forgets where training began, and its memory grows with training: a share of it, not a number of steps. That share is said
by the standard deviation of tau / t under the averaging density, 0.05 or 0.1, say; g follows. A few snapshots of two such
averages, kept during training, add up to nearly any other one.

References:
    Karras, Aittala, Lehtinen, Hellsten, Aila & Laine, Analyzing and Improving the Training Dynamics of Diffusion Models,
    CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def power_of(width: float) -> float:
    """The exponent g of the average whose memory has a standard deviation of this share of training.

    Raises:
        ValueError: not between 0 and that of a plain mean, 0.2886.

    Example:
        >>> round(power_of(0.1), 3), round(power_of(0.05), 2)
        (6.937, 16.97)
    """
    if not 0 < width < 12**-0.5:
        raise ValueError(f"power_of({width}): expected a share of training between 0 and {12**-0.5:.4f}")
    # width^2 = (g + 1) / ((g + 2)^2 (g + 3))
    precision = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision]).real.max())


def power_decay(step: int, power: float) -> float:
    """The decay of an exponential average that makes it this power-function average, at a step counted from 1.

    Example:
        >>> power_decay(1, 7.0), round(power_decay(1000, 7.0), 4)
        (0.0, 0.992)
    """
    return (1 - 1 / step) ** (power + 1)


def reconstruction(steps: Sequence[float], powers: Sequence[float], step: float, power: float) -> list[float]:
    r"""What snapshots of averages are to be multiplied by, so that their sum is nearest to another average.

    Nearest in the densities over training time, by least squares: inner products of these have closed forms.

    Args:
        steps: when each snapshot was taken, `[K]`.
        powers: of its average, `[K]`.
        step: up to when the average wanted goes.
        power: of that average.

    Example:
        >>> [round(weight, 4) + 0.0 for weight in reconstruction([50, 100, 100], [7.0, 7.0, 17.0], 100, 7.0)]
        [0.0, 1.0, 0.0]
    """
    t, g = np.asarray(steps, dtype=np.float64), np.asarray(powers, dtype=np.float64)
    among = _inner(t[:, None], g[:, None], t, g)
    return np.linalg.lstsq(
        among, _inner(t, g, np.asarray(float(step)), np.asarray(float(power))), rcond=1e-12
    )[0].tolist()


def _inner(t: np.ndarray, g: np.ndarray, s: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Inner product of the densities (g + 1) tau^g / t^(g + 1) on [0, t] and (h + 1) tau^h / s^(h + 1) on [0, s]."""
    later, its_power = np.maximum(t, s), np.where(t < s, h, g)
    return (g + 1) * (h + 1) / (g + h + 1) * (np.minimum(t, s) / later) ** its_power / later
