"""Diffusion: one denoiser, noise levels, and everything that can be computed from the two. Pure torch."""
