"""Is one sample like another, and what does a log probability cost: pure functions of tensors."""

from pgen.metrics.accounting import bits_per_dim, cell_log_mass, mean_and_error, perplexity
from pgen.metrics.classifier import Classified, c2st
from pgen.metrics.detection import auroc, calibration_error
from pgen.metrics.two_sample import (
    TwoSampleTest,
    energy_distance,
    mmd,
    sliced_wasserstein,
    two_sample_test,
)

__all__ = [
    "Classified",
    "TwoSampleTest",
    "auroc",
    "bits_per_dim",
    "c2st",
    "calibration_error",
    "cell_log_mass",
    "energy_distance",
    "mean_and_error",
    "mmd",
    "perplexity",
    "sliced_wasserstein",
    "two_sample_test",
]
