"""The kit on pgen's own backends, as on anybody's."""

from pgen.testing import conformance

test_exact_conforms = conformance("exact")
test_variational_conforms = conformance("variational")
