"""Densities of programs, called directly."""

import pyro
import pyro.distributions as dist
import torch

from pgen.density import Density
from pgen.inspection import inspect_problem
from pgen.problem import Problem


def test_many_data_sets_of_a_program_whose_latents_are_all_summed_out():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0))

    structure, problem = inspect_problem(Problem.of(program, {"x": torch.zeros(5)}))
    sets = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    value, gradient = Density.of(problem.whole(), structure, ["z"]).on_many(torch.zeros(6, 0), {"x": sets})
    terms = [
        torch.log(torch.tensor(p)) + dist.Normal(z, 1.0).log_prob(sets) for z, p in ((0.0, 0.7), (1.0, 0.3))
    ]
    wanted = torch.logaddexp(*terms).sum(1)
    assert torch.allclose(value, wanted.repeat_interleave(2), atol=1e-5)
    assert gradient.shape == (6, 0)
