"""Laws of power-function averages: their memory, and their reconstruction from others."""

import numpy as np
import pytest

from pgen.algorithms.diffusion.averaging import power_decay, power_of, reconstruction


def memory(power, steps):
    """What each step counts in the average after all of them."""
    counts = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = power_decay(step, power)
        counts[:step] *= decay
        counts[step - 1] += 1 - decay
    return counts


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_memory_has_the_width_that_was_asked_for(width):
    counts, power = memory(power_of(width), 2000), power_of(width)
    tau = (np.arange(2000) + 0.5) / 2000
    assert abs(counts.sum() - 1) < 1e-12
    mean = (counts * tau).sum()
    assert abs(np.sqrt((counts * (tau - mean) ** 2).sum()) / width - 1) < 2e-2
    assert np.abs(counts / ((power + 1) * tau**power / 2000) - 1)[1000:].max() < 0.05


def test_another_average_is_reconstructed_from_snapshots_of_two():
    """Of weights that wander: nearer to the average wanted than any snapshot is."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(800, 20)).cumsum(0)
    powers = [power_of(0.05), power_of(0.1)]
    steps = [s for s in range(50, 801, 50) for _ in powers]
    snapshots = np.stack([memory(powers[i % 2], s) @ weights[:s] for i, s in enumerate(steps)])
    for width in (0.06, 0.15, 0.2):
        wanted = memory(power_of(width), 800) @ weights
        share = reconstruction(steps, powers * (len(steps) // 2), 800, power_of(width))
        error = np.abs(np.array(share) @ snapshots - wanted).mean()
        assert error < 0.05 * np.abs(snapshots - wanted).mean(1).min()


def test_impossible_widths_are_refused():
    with pytest.raises(ValueError, match="expected a share"):
        power_of(0.3)
