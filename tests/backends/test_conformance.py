"""The kit on pgen's own backends, as on anybody's."""

import pgen
from pgen.testing import conformance

test_exact_conforms = conformance("exact")
test_variational_conforms = conformance("variational")
test_mcmc_conforms = conformance(pgen.backend("mcmc", chains=32, warmup=100, draws=200))
