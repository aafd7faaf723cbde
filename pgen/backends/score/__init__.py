"""Score matching and diffusions: learn denoisers, draw, weigh and condition by them.

method.py       the backend, and how a fit goes
options.py      what its options stand for, and which can be
needs.py        what is needed of a program, and what is offered
training.py     losses of denoisers at observed values
joint.py        latents learned beside the rest of a program: the bound, and the guide's queries
consistency.py  consistency functions, from data or a teacher
answers.py      queries on the result
rows.py         log probabilities by rows, with their errors
inference.py    how posteriors are drawn, and what comes of it
posterior.py    latents given what is observed: which rows, how many particles and levels
conditional.py  the algorithms, for rows of one kind
scales.py       the scales of a prior that they are set by
prior.py        latents with denoisers side by side, as one vector
evidence.py     what is observed, as a function of that vector
"""

from pgen.backends.score.method import Score, pgen_backends

__all__ = ["Score", "pgen_backends"]
