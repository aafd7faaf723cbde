# %% [markdown]
# # Your own backend
#
# A backend is a frozen dataclass, whose fields are its options, with two methods: `examine` says what it would
# answer about a program, or which site lacks what; `fit` returns an object with a method for each query offered.
#
# This one integrates over a single real latent $z$ by its prior quantiles. With $F$ the distribution function of the
# prior and midpoints $u_g = (g - \tfrac12) / G$,
#
# $$ p(x) = \int_0^1 p\big(x \mid F^{-1}(u)\big)\, du \;\approx\; \frac1G \sum_{g=1}^{G} w_g, \qquad
#    w_g = p(x \mid z_g), \qquad z_g = F^{-1}(u_g), $$
#
# and the posterior puts mass $w_g / \sum_h w_h$ on $z_g$.

# %%
import math
import types
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pgen
from pgen.capability import Capability, Exactness, Query
from pgen.handlers import Substitute
from pgen.sampling import draw, observed_scalars, particles, spread
from pgen.testing import conformance_report

INVERTIBLE = {"Normal", "Uniform", "Exponential", "Laplace", "Cauchy", "LogNormal"}  # whose F^-1 torch has


@dataclass(frozen=True)
class Quantiles:
    """Midpoint rule on the quantiles of the prior of one real latent."""

    name: ClassVar[str] = "quantiles"
    points: int = 4000

    def examine(self, structure):
        """One latent, shared by all rows, with a quantile function; everything else must have a density."""
        if structure.params:
            return pgen.Refusal(
                None, "fixed parameters", f"{structure.params[0]!r} is to be learned, and it only integrates"
            )
        if len(structure.latents) != 1:
            return pgen.Refusal(
                None, "a single latent", f"it integrates over one, not {list(structure.latents)}"
            )
        site = structure.sites[structure.latents[0]]
        if site.distribution not in INVERTIBLE or site.plates or site.event_shape:
            why = f"it needs a real number whose law is one of {', '.join(sorted(INVERTIBLE))}"
            return pgen.Refusal(site.name, "quantiles", why)
        paths = pgen.require(structure, observed=[Capability.LOG_PROB])
        if isinstance(paths, pgen.Refusal):
            return paths
        answers = {Query.LOG_PROB: Exactness.ESTIMATE, Query.POSTERIOR: Exactness.ESTIMATE}
        if all(Capability.SAMPLE in s.capabilities for s in structure):
            answers[Query.SAMPLE] = Exactness.EXACT
        return pgen.Offer(answers, pgen.Rank.SUITED, f"{site.name} summed over {self.points} prior quantiles")

    def fit(self, problem, structure, run):
        """Nothing to learn."""
        return Answers(self.points, problem, structure)


@dataclass
class Answers:
    """One method for each query; random numbers come seeded, so just draw."""

    points: int
    problem: pgen.Problem
    structure: pgen.Structure

    def weigh(self, problem, structure):
        """The quantiles [G], and the log likelihood of the data at each of them [G]."""
        (site,) = structure.latents
        prior = poutine.trace(problem).get_trace().nodes[site]["fn"]
        z = prior.icdf((torch.arange(self.points, device=problem.device) + 0.5) / self.points)
        side_by_side = particles(problem, structure, self.points)  # the program under an outer plate
        trace = poutine.trace(Substitute({site: spread(z, structure, site)})(side_by_side)).get_trace()
        trace.compute_log_prob()
        return z, sum(trace.nodes[s]["log_prob"].reshape(self.points, -1).sum(1) for s in structure.observed)

    def log_prob(self, problem, structure):
        """All rows share z, so there is one number. Its error: what every other point alone would say."""
        _, log_weights = self.weigh(problem, structure)
        value = (log_weights.logsumexp(0) - math.log(self.points)).reshape(1)
        half = log_weights[::2].logsumexp(0) - math.log(self.points / 2)
        dims = observed_scalars(problem, structure)
        return pgen.Estimate(value, Exactness.ESTIMATE, (value - half).abs(), structure.measure, dims)

    def posterior(self, problem, structure, n):
        """Quantiles drawn with the weights."""
        z, log_weights = self.weigh(problem, structure)
        return {structure.latents[0]: z[dist.Categorical(logits=log_weights).sample((n,))]}

    def sample(self, n):
        """The program, run forward."""
        return draw(self.problem, self.structure, n)

    def tensors(self):
        """Nothing was learned, so nothing is saved."""
        return {}

    def load(self, tensors):
        """Nothing was saved."""


# %% [markdown]
# ## Use it
#
# A backend needs no registration to be used. On a Gaussian mean with unit noise and prior $N(0, 2^2)$, the posterior
# mean of $n$ observations is $\sum_i x_i / (n + \tfrac14)$.


# %%
def program(n):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(z, 1.0))


data = {"x": torch.tensor([0.5, 1.5, 2.5, 1.1])}
fitted = pgen.fit(program, data, Quantiles(), seed=0)
mean = fitted.posterior(n=100_000, seed=0)["z"].mean()
print(fitted, f"\nposterior mean {mean:.4f}, exact {5.6 / 4.25:.4f}")
print(pgen.fit(program, data, "exact").log_prob(), "against", fitted.log_prob())

# %% [markdown]
# ## Check it, and share it
#
# The conformance kit holds a backend to its own offers, on problems with exact answers. As a plugin, a package names
# its module in the entry-point group `pgen`; `pgen plugins new NAME` writes one. Here, a registry of just this module:

# %%
module = types.ModuleType("quantiles")
module.pgen_backends = pgen.hookimpl(lambda: [Quantiles], specname="pgen_backends")
print(pgen.Registry.of(module).backends)

report = conformance_report(Quantiles())
print(report)
assert report.ok
assert abs(float(mean) - 5.6 / 4.25) < 0.02
