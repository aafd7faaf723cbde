"""The kit on pgen's own backends, as on anybody's."""

import pytest

import pgen
from pgen.testing import DENOISED, ENERGIES, UNSUITABLE, conformance

#: a normal law is the nearest of its kind to a posterior with two modes, and not near
NORMAL = {
    f"{check}[denoised-latent]": "a guide of normal laws, for a posterior with two modes"
    for check in ("posterior_is_true", "marginals_are_true")
}

KNOWN_BY_DENOISERS = [p.name for p in DENOISED]
KNOWN_BY_ENERGIES = [p.name for p in ENERGIES]

test_exact_conforms = conformance("exact")
test_exact_conforms_with_denoisers = conformance("exact", problems=KNOWN_BY_DENOISERS)
test_variational_conforms = conformance("variational")
test_variational_conforms_with_denoisers = conformance(
    "variational", expected_failures=NORMAL, problems=KNOWN_BY_DENOISERS
)
test_score_conforms = conformance("score", problems=[p.name for p in (*DENOISED, *UNSUITABLE)])
test_mcmc_conforms = conformance(pgen.backend("mcmc", chains=32, warmup=100, draws=200))
test_exact_conforms_with_energies = conformance("exact", problems=KNOWN_BY_ENERGIES)
test_variational_conforms_with_energies = pytest.mark.slow(
    conformance(pgen.backend("variational", evaluate="importance"), problems=KNOWN_BY_ENERGIES)
)
test_mcmc_conforms_with_energies = pytest.mark.slow(
    conformance(pgen.backend("mcmc", chains=32, warmup=100, draws=200), problems=KNOWN_BY_ENERGIES)
)
