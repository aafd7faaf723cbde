"""Recording: a function of tensors, run once, becomes the list of tensor operations that it performed.

    recorder.py    what was done, operation by operation
    tape.py        the list
    simplify.py    the same result by fewer operations; passes of some length have files of their own:
                   writes.py, builder.py, rewrite.py, sums.py, together.py, columns.py, cost.py
    precision.py   the same operations in double precision
    outputs.py     what others see besides numbers: shared memory
    replay.py      a tape as one Python function; buffers.py: memory for it
    inductor.py    a tape as one native function: products.py, draws.py (apart from it), compiling.py (in another
                   process), libraries.py (what that leaves on disk), machine.py
    verify.py      whether these give what the function gave
    recording.py   all of these, once
    recorded.py    `record`: a recording for every kind of arguments

A Pyro program spends its time on handlers, shapes and checks, and its gradient on bookkeeping; the tensors themselves
are small. Replaying the operations costs a microsecond each, for one chain or for a thousand.
"""

from pgen.algorithms.record.inductor import Inductor, NotCompiled
from pgen.algorithms.record.recorded import ManyRecordings, NotRecorded, Recorded, record
from pgen.algorithms.record.recorder import Unrecordable, tape_of, where_raised
from pgen.algorithms.record.recording import Compiler, Recording
from pgen.algorithms.record.replay import Replay, replay_of
from pgen.algorithms.record.simplify import simplified
from pgen.algorithms.record.tape import Op, Ref, Tape

__all__ = [
    "Compiler",
    "Inductor",
    "ManyRecordings",
    "NotCompiled",
    "NotRecorded",
    "Op",
    "Recorded",
    "Recording",
    "Ref",
    "Replay",
    "Tape",
    "Unrecordable",
    "record",
    "replay_of",
    "simplified",
    "tape_of",
    "where_raised",
]
