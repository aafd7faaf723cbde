"""For authors of backends: a conformance kit, calibration, problems with exact answers, assertions with error rates."""

from pgen.testing.calibration import coverage, sbc
from pgen.testing.calibration_report import Calibration, CalibrationRow, Coverage, CoverageRow
from pgen.testing.conformance import CHECKS, Report, ReportRow, conformance, conformance_report
from pgen.testing.problems import DENOISED, ENERGIES, LEARNED, SUITED, UNSUITABLE, Reference
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
    "DENOISED",
    "ENERGIES",
    "LEARNED",
    "SUITED",
    "UNSUITABLE",
    "Calibration",
    "CalibrationRow",
    "Coverage",
    "CoverageRow",
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
    "coverage",
    "discrepancy_noticed",
    "draws_needed",
    "draws_needed_for_cdf",
    "sbc",
    "z_threshold",
]
