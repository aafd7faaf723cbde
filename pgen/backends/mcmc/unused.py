"""Options of a run that chains have no use for, and what says the same to them."""

from __future__ import annotations

from collections.abc import Mapping

from pgen.run import Run

_LENGTH = "warmup= and draws= of the backend say how long chains are"
_STEP = "step_size= or target_accept= of the backend say how far they move"
_NOTHING = "nothing is learned by gradient steps"
_INSTEAD = {
    "steps": _LENGTH,
    "warmup_steps": _LENGTH,
    "lr": _STEP,
    "schedule": _STEP,
    "optimizer": _NOTHING,
    "clip_norm": _NOTHING,
    "weight_decay": _NOTHING,
    "ema": _NOTHING,
    "validation": _NOTHING,
    "validate_every": _NOTHING,
    "patience": _NOTHING,
    "batch_size": "kernel='sgld' and 'sghmc' take batches, the others all rows",
}


def unused(run: Run, *, batches: bool) -> Mapping[str, str]:
    """The options of a run that are set in vain, each with what there is in its place.

    Args:
        run: with its options; `steps=0` has a meaning, to draw nothing.
        batches: whether the kernel looks at batches of rows.
    """
    used = {"steps"} if run.steps == 0 else set()
    used |= {"batch_size"} if batches else set()
    return {name: _INSTEAD[name] for name in run.given if name in _INSTEAD and name not in used}
