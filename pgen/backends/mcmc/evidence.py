"""The evidence, by tempered particles that walk from a normal law like the posterior to the posterior itself."""

from __future__ import annotations

from pgen.algorithms.annealing import TemperedSMC, cloud_scale, evidence_below
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.path import Path, gaussian
from pgen.backends.mcmc.answers import Sampled
from pgen.capability import Estimate, Exactness
from pgen.sampling import observed_scalars

_DRAWS = 4000
_PARTICLES = 256
_WIDER = 1.25  # than the posterior: the reference has to cover its tails


def evidence(islands: int, sampled: Sampled) -> Estimate:
    r"""$\log p(x)$, by tempered SMC from a normal law fitted to draws of the posterior.

    The standard error comes from the spread of independent islands of particles.
    """
    positions, _, _ = sampled.positions(_DRAWS)
    weight = positions.new_full((len(positions),), 1 / len(positions))
    scale = _WIDER * cloud_scale(positions, weight, dense=positions.shape[1] <= 200)
    path = Path(sampled.target_in_parts, *gaussian(positions.mean(0), scale))
    smc = TemperedSMC(HMC(steps=4), particles=_PARTICLES, islands=islands, moves=2, accept=0.8)
    arrived = smc.run(path)
    found = evidence_below(arrived.log_evidence)
    return Estimate(
        found.estimate.reshape(1),
        Exactness.UNNORMALIZED if sampled.structure.weighted else Exactness.ESTIMATE,
        stderr=found.stderr.reshape(1),
        measure=sampled.structure.measure,
        dims=observed_scalars(sampled.problem, sampled.structure, together=True),
        particles=_PARTICLES * islands,
    )
