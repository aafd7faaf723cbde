"""For authors of backends: a conformance kit, problems with exact answers, calibrated assertions."""

from pgen.testing.conformance import CHECKS, Report, ReportRow, conformance, conformance_report
from pgen.testing.problems import LEARNED, SUITED, UNSUITABLE, Reference
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_distribution,
    assert_estimate,
    assert_frequencies,
    assert_lower_bound,
    assert_mean,
    assert_moments,
    assert_same_distribution,
    assert_standard_normal,
    discrepancy_noticed,
    draws_needed,
    draws_needed_for_cdf,
    z_threshold,
)

__all__ = [
    "CHECKS",
    "LEARNED",
    "SUITED",
    "UNSUITABLE",
    "Reference",
    "Report",
    "ReportRow",
    "StatisticalFailure",
    "assert_distribution",
    "assert_estimate",
    "assert_frequencies",
    "assert_lower_bound",
    "assert_mean",
    "assert_moments",
    "assert_same_distribution",
    "assert_standard_normal",
    "conformance",
    "conformance_report",
    "discrepancy_noticed",
    "draws_needed",
    "draws_needed_for_cdf",
    "z_threshold",
]
