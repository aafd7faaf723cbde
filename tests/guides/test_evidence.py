"""What a guide is given: the observed values and the plates, read with or without a run of the program."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.guides import Reader, Slot
from pgen.guides.evidence import Probe, positional_plates
from pgen.inspection import inspect_problem
from pgen.problem import Problem


class Counted:
    """A program that counts its runs."""

    def __init__(self, program):
        self.program, self.runs = program, 0

    def __call__(self, x):
        self.runs += 1
        return self.program(x)


def images(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(loc, torch.ones(6)).to_event(1), obs=x.reshape(-1, 6))


def halved(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x / 2)


def generative(n):
    with pyro.plate("rows", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def subsampled(x):
    with pyro.plate("rows", len(x), subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def reader_of(program, data):
    structure, problem = inspect_problem(Problem.of(program, data))
    return Reader(problem, structure), problem, structure


def test_an_argument_observed_in_another_shape_needs_no_run():
    program = Counted(images)
    read, problem, _ = reader_of(program, torch.randn(10, 2, 3))
    before = program.runs
    seen = read(problem.take(torch.tensor([3, 4])))
    assert program.runs == before
    assert set(seen.observed) == {"x"}  # the argument is the observed value, and is not read twice
    assert torch.equal(seen.observed["x"], problem.inputs["x"][3:5].reshape(2, 6))
    assert seen.plates == {"rows": Slot(2, -1)}


def test_values_that_the_program_computes_are_read_off_one_run():
    program = Counted(halved)
    read, problem, _ = reader_of(program, torch.randn(10))
    before = program.runs
    seen = read(problem)
    assert program.runs == before + 1
    assert torch.equal(seen.observed["y"], problem.inputs["x"] / 2)
    assert torch.equal(seen.observed["input:x"], problem.inputs["x"])


def test_values_observed_by_name_keep_their_missing_elements():
    x = torch.randn(10)
    x[2] = torch.nan
    read, problem, _ = reader_of(generative, {"x": x})
    torch.testing.assert_close(read(problem).observed["x"], x, equal_nan=True)


def test_a_subsample_is_read_with_its_indices():
    read, problem, _ = reader_of(subsampled, torch.arange(20.0))
    first, second = read(problem), read(problem)
    assert first.plates["rows"].size == 20
    assert first.plates["rows"].length == 4
    assert torch.equal(first.observed["x"], first.plates["rows"].index.float())
    assert not torch.equal(first.plates["rows"].index, second.plates["rows"].index)


def test_other_shapes_are_noticed():
    def sized(y):
        with pyro.plate("rows", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    read, problem, _ = reader_of(sized, torch.randn(10, 3))
    assert read(problem).plates["columns"].size == 3
    assert read(problem.with_data(torch.randn(4, 7))).plates == {"rows": Slot(4, -2), "columns": Slot(7, -1)}


@pytest.mark.parametrize("program", [halved, images])
def test_reading_is_not_seen_by_the_handlers_around_it(program):
    read, problem, _ = reader_of(program, torch.randn(10, 6) if program is images else torch.randn(10))
    wide = problem.with_data(torch.randn(5, 6, 1) if program is images else torch.randn(5))
    with poutine.trace() as outer, pyro.plate("_particles", 3, dim=-2):
        seen = read(wide)
    assert not [n for n in outer.trace.nodes if n in ("z", "x", "y")]
    assert all(value.shape[0] == 5 for value in seen.observed.values())


def test_probing_leaves_the_generator_as_it_was():
    read, problem, structure = reader_of(halved, torch.randn(10))
    before = torch.get_rng_state()
    Probe.of(problem, structure, read)
    assert torch.equal(torch.get_rng_state(), before)


def test_plates_with_a_constant_for_each_element_are_positional():
    def constants(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("same", 3, dim=-1):
                pyro.sample("u", dist.Normal(z, 1.0))
            with pyro.plate("scaled", 3, dim=-1):
                pyro.sample("x", dist.Normal(z * torch.arange(3.0), 1.0), obs=x)

    structure, problem = inspect_problem(Problem.of(constants, torch.randn(5, 3)))
    assert positional_plates(problem, structure) == {"scaled"}


def test_plates_with_a_parameter_for_each_element_are_positional_even_if_all_start_equal():
    column = torch.nn.Linear(1, 3)
    torch.nn.init.zeros_(column.weight)
    torch.nn.init.zeros_(column.bias)

    def learned(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(column(z.unsqueeze(-1)).squeeze(-2), 1.0), obs=x)

    structure, problem = inspect_problem(Problem.of(learned, torch.randn(5, 3)))
    assert positional_plates(problem, structure) == {"columns"}
    assert torch.equal(column.bias, torch.zeros(3))


def test_plates_whose_elements_only_hold_different_data_are_not():
    def regression(x, y):
        with pyro.plate("rows", len(x), dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1):
                v = pyro.sample("v", dist.Normal(w, 1.0))
                pyro.sample("y", dist.Normal(v * x, 1.0), obs=y)

    data = {"x": torch.randn(5, 3), "y": torch.randn(5, 3)}
    structure, problem = inspect_problem(Problem.of(regression, data))
    assert positional_plates(problem, structure) == frozenset()
