"""Fixed-step solvers: objects with `step(state, t, t_next, fn)`, one file for each algorithm. No registry is needed."""

from pgen.algorithms.diffusion.solvers.adams_bashforth import ExponentialAdamsBashforth
from pgen.algorithms.diffusion.solvers.ancestral import Ancestral
from pgen.algorithms.diffusion.solvers.annealed_langevin import AnnealedLangevin
from pgen.algorithms.diffusion.solvers.consistency import Consistency
from pgen.algorithms.diffusion.solvers.ddim import DDIM
from pgen.algorithms.diffusion.solvers.dpm_solver import DPMSolverPP
from pgen.algorithms.diffusion.solvers.euler import Euler
from pgen.algorithms.diffusion.solvers.euler_maruyama import EulerMaruyama
from pgen.algorithms.diffusion.solvers.heun import Heun
from pgen.algorithms.diffusion.solvers.predictor_corrector import PredictorCorrector
from pgen.algorithms.diffusion.solvers.sde_dpm_solver import SDEDPMSolverPP
from pgen.algorithms.diffusion.solvers.state import History, Solver, moved, only_down, value
from pgen.algorithms.diffusion.solvers.unipc import UniPC

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "ddim": DDIM,
    "ancestral": Ancestral,
    "euler-maruyama": EulerMaruyama,
    "predictor-corrector": PredictorCorrector,
    "annealed-langevin": AnnealedLangevin,
    "heun": Heun,
    "dpm++": DPMSolverPP,
    "sde-dpm++": SDEDPMSolverPP,
    "unipc": UniPC,
    "adams-bashforth": ExponentialAdamsBashforth,
    "consistency": Consistency,
}
"""Solvers by name, for command lines and tables; anything with `step` does where a solver is taken."""

__all__ = [
    "DDIM",
    "SOLVERS",
    "Ancestral",
    "AnnealedLangevin",
    "Consistency",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "ExponentialAdamsBashforth",
    "Heun",
    "History",
    "PredictorCorrector",
    "SDEDPMSolverPP",
    "Solver",
    "UniPC",
    "moved",
    "only_down",
    "value",
]
