"""The conformance kit of pgen on this backend: contract, hygiene, truth, honesty, saving and loading."""

import pgen
from pgen.testing import conformance

test_conformance = conformance(pgen.backend("template"))
