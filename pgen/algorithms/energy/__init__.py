"""Unnormalised densities: how chains move on them, what learns them, and what they integrate to."""
