"""Who makes replays of losses faster, by the name that a run gives."""

from __future__ import annotations

from pgen.algorithms.record import Compiler, Inductor
from pgen.algorithms.record.products import by_onednn, pays

# Replays are compared with the program as training goes on, gradients as one vector: some are round-off and no more.
COMPILERS: dict[str, Compiler | None] = {
    "auto": by_onednn if pays() else None,
    "inductor": Inductor(),
    "background": Inductor(wait=False, compare=False),
}
