"""Markov chain kernels, batched over chains."""
