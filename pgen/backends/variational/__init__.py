"""Variational inference: one backend, many objectives and guides.

proposal.py    the guide: made from the program, or the user's
joint.py       guide and program on the same values -> sitewise terms
settle.py      what is decided before the first step
objectives.py  terms -> loss per row
simulate.py    simulations of the program as data for the guide
answers.py     queries on the result
method.py      the options, and where all of this meets
"""

from pgen.backends.variational.method import Variational, pgen_backends

__all__ = ["Variational", "pgen_backends"]
