"""Score matching and diffusions: learn denoisers, draw, weigh and condition by them.

method.py     the options, and how a fit goes
needs.py      what is needed of a program, and what is offered
training.py   the losses
answers.py    queries on the result
posterior.py  latents given what is observed: guides, particles, moves
prior.py      latents with denoisers side by side, as one vector
evidence.py   what is observed, as a function of that vector
"""

from pgen.backends.score.method import Score, pgen_backends

__all__ = ["Score", "pgen_backends"]
