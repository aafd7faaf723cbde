r"""Posteriors under a diffusion prior: what was seen, and algorithms that draw x_0 given it.

conditional denoisers    E[x_0 | x_sigma, y], to be integrated by any solver or to twist particles:
DPS, LGD (any likelihood); PiGDM, MMPS (linear Gaussian); condition, Conjugate (mixtures, exact)
solvers                  with an observation inside: DDRM, DPSStep, Replacement (and the grid of RePaint)
samplers                 Twisted (sequential Monte Carlo, asymptotically exact), SplitGibbs, LineMALA (Metropolis)
editing                  sdedit
"""

from pgen.algorithms.diffusion.posteriors.conjugate import Conjugate, condition
from pgen.algorithms.diffusion.posteriors.ddrm import DDRM
from pgen.algorithms.diffusion.posteriors.dps import DPS, DPSStep, width_of
from pgen.algorithms.diffusion.posteriors.editing import sdedit
from pgen.algorithms.diffusion.posteriors.guide import Guide, LogLikelihood, Look
from pgen.algorithms.diffusion.posteriors.lgd import LGD
from pgen.algorithms.diffusion.posteriors.metropolis import Conditioned, LineMALA, Moves, log_ratio, refine
from pgen.algorithms.diffusion.posteriors.mmps import MMPS
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian
from pgen.algorithms.diffusion.posteriors.pigdm import PiGDM
from pgen.algorithms.diffusion.posteriors.replacement import Replacement, repaint, repaint_grid
from pgen.algorithms.diffusion.posteriors.resampling import effective_size, systematic
from pgen.algorithms.diffusion.posteriors.split_gibbs import SplitGibbs
from pgen.algorithms.diffusion.posteriors.twisted import Particles, Twisted

__all__ = [
    "DDRM",
    "DPS",
    "LGD",
    "MMPS",
    "Conditioned",
    "Conjugate",
    "DPSStep",
    "Guide",
    "LineMALA",
    "LinearGaussian",
    "LogLikelihood",
    "Look",
    "Moves",
    "Particles",
    "PiGDM",
    "Replacement",
    "SplitGibbs",
    "Twisted",
    "condition",
    "effective_size",
    "log_ratio",
    "refine",
    "repaint",
    "repaint_grid",
    "sdedit",
    "systematic",
    "width_of",
]
