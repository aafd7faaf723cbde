"""Exact inference: sums over finite latents, integrals over Gaussian and conjugate ones, or neither.

method.py     the options, what is offered, and how a fit goes
groups.py     which latents are tied together, and what could integrate each group exactly
answers.py    queries on the result
solution.py   a problem solved: its evidence, posterior draws and marginals, group by group
finite.py     groups of finite latents, by variable elimination
gaussian.py   groups of Gaussian latents, by an expansion that proves itself
conjugate.py  a latent with a conjugate prior, by an update that proves itself
laws.py       marginals as Pyro distributions
climb.py      to the maximum, by L-BFGS or as the run says
mode.py       the most probable values instead of an integral
"""

from pgen.backends.exact.method import Exact, pgen_backends

__all__ = ["Exact", "pgen_backends"]
