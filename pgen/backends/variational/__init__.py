"""Variational inference: one backend, many objectives and guides.

method.py      the options, and where all of this meets
needs.py       what it needs of a program and offers in return
joint.py       guide and program on the same values -> sitewise terms
settle.py      what is decided before the first step
objectives.py  terms -> loss per row
players.py     whose tensors move by which loss
simulate.py    simulations of the program as data for the guide
answers.py     queries on the result
draws.py       draws and marginals, shaped as the program shapes them
mixture.py     laws of marginals
"""

from pgen.backends.variational.answers import OtherDataWarning
from pgen.backends.variational.method import Variational, pgen_backends

__all__ = ["OtherDataWarning", "Variational", "pgen_backends"]
