"""Linear operators between what is wanted and what is seen, with adjoints, singular values and pseudo-inverses."""

from pgen.algorithms.diffusion.operators.base import (
    Composed,
    Function,
    LinearOperator,
    Spectrum,
    adjoint_error,
    as_matrix,
)
from pgen.algorithms.diffusion.operators.fourier import Blur, FourierUndersample
from pgen.algorithms.diffusion.operators.radon import Radon
from pgen.algorithms.diffusion.operators.rows import Dense, Downsample, Greyscale, Mask

__all__ = [
    "Blur",
    "Composed",
    "Dense",
    "Downsample",
    "FourierUndersample",
    "Function",
    "Greyscale",
    "LinearOperator",
    "Mask",
    "Radon",
    "Spectrum",
    "adjoint_error",
    "as_matrix",
]
