"""The kit on pgen's own backends, as on anybody's."""

import pgen
from pgen.testing import conformance

test_exact_conforms = conformance("exact")

test_variational_conforms = conformance("variational", run=pgen.Run(steps=600, lr=0.02, schedule="cosine"))
