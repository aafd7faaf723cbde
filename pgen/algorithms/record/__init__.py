"""Recording: a function of tensors, run once, becomes the list of tensor operations that it performed.

    tape.py       what was done, operation by operation
    simplify.py   the same result by fewer operations
    replay.py     a tape as one Python function
    recorded.py   `record`: a tape for every kind of arguments

A Pyro program spends its time on handlers, shapes and checks, and its gradient on bookkeeping; the tensors themselves
are small. Replaying the operations costs a microsecond each, for one chain or for a thousand.
"""

from pgen.algorithms.record.recorded import NotRecorded, Recorded, record
from pgen.algorithms.record.tape import Unrecordable, where_raised

__all__ = ["NotRecorded", "Recorded", "Unrecordable", "record", "where_raised"]
