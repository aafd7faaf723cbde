"""How many chains and draws there are where nobody says so: what costs little more than one chain.

A gradient for many chains takes as many operations as for one, and on small problems these are what takes the time; so
there are as many chains as do not take several times as long. Programs of thousands of operations take their time for
each draw whatever the number of chains, so that these make fewer draws.
"""

from __future__ import annotations

import math

from pgen.evaluation import Functions
from pgen.structure import Structure

FEWEST, MOST = 32, 256
_PARTICLES = 16  # groups of particles, and chains at each temperature
_IN_TURN = 4  # chains, where one has to wait for the other
_MICROSECONDS = 1.5  # of an operation on few numbers
_NANOSECONDS = 0.7  # of each number, where there are many
_DEARER = 3.0  # times as long as one chain is little more
_SMALL = 128  # numbers in latents and data, for which the largest number of chains is tried at once
_MANY_SITES = 32  # of a program with a Python loop, which takes long to record
_BRIEF = 512  # numbers in those, for which that is so
_ENOUGH = 20_000  # draws in all
_LEAST, _MOST_DRAWS = 400, 1000  # of each chain
_FEWER = ((8000, 100), (2000, 200))  # of each chain, for programs of more operations than that
_POOLING = 16  # chains from which on they learn enough from each other for ChEES


def kernel_for(chains: int | None) -> str:
    """What suits so many chains: ChEES learns from all of them, a tree needs none but its own."""
    return "chees" if chains is None or chains >= _POOLING else "nuts"


def tried(structure: Structure) -> int:
    """Chains for which a density is recorded first: one recording does, if there will be as many."""
    numbers = sum(math.prod(site.batch_shape + site.event_shape) for site in structure)
    return MOST if numbers <= (_BRIEF if _is_loop(structure) else _SMALL) else FEWEST


def chains_for(functions: Functions, kernel: object, structure: Structure) -> int:
    """How many chains."""
    found, first = _chains_for(functions, kernel), tried(structure)
    # What was recorded already will do, if that takes long: twice the chains would save less.
    return first if _is_loop(structure) and first / 2 <= found <= first * 2 else found


def _is_loop(structure: Structure) -> bool:
    return len(structure.sites) > _MANY_SITES


def _chains_for(functions: Functions, kernel: object) -> int:
    if kernel in ("smc", "tempering"):
        return _PARTICLES
    if functions.way not in ("recorded", "unrecorded"):
        return _IN_TURN
    operations, numbers = functions.cost
    if operations > _FEWER[-1][0]:  # to record it once more takes longer than more chains would save
        return FEWEST
    ratio = _DEARER * operations * _MICROSECONDS * 1000 / max(1.0, numbers * _NANOSECONDS)
    return next((c for c in (MOST, MOST // 2, MOST // 4) if c <= ratio), FEWEST)


def draws_for(chains: int, operations: int) -> int:
    """How many draws of each chain, of a program of so many operations."""
    few = next((few for most, few in _FEWER if operations > most), None)
    return few if few is not None else min(_MOST_DRAWS, max(_LEAST, -(-_ENOUGH // chains)))
