"""Markov chain Monte Carlo: one backend, many kernels.

method.py    the options, and where all of this meets
needs.py     what it needs of a program and offers in return
start.py     where chains begin
samplers.py  kernels by name, each with its way of warming up
chains.py    chains in progress, block by block
ledger.py    what they have given so far, in memory or on disk
answers.py   queries on the result
evidence.py  the log of the normaliser
"""

from pgen.backends.mcmc.method import MCMC, pgen_backends

__all__ = ["MCMC", "pgen_backends"]
