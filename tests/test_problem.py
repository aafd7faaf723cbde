"""How data meets a program: every form of data, every way of asking for rows, and the text of every error."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pgen.errors import DataError
from pgen.problem import Problem


def generative(n):
    with pyro.plate("data", n):
        return pyro.sample("x", dist.Normal(0.0, 1.0))


def pyros_way(x, y=None):
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def trace(problem):
    return poutine.trace(problem).get_trace()


def observed(problem, site):
    node = trace(problem).nodes[site]
    return node["value"] if node["is_observed"] else None


X = torch.arange(6.0)


# --- forms of data ---

FORMS = {
    "mapping": {"x": X, "y": 2 * X},
    "tuple": (X, 2 * X),
    "list": [X, 2 * X],
    "arrays": {"x": X.numpy(), "y": (2 * X).numpy()},
    "numbers": {"x": X.tolist(), "y": (2 * X).tolist()},
    "tensor dataset": TensorDataset(X, 2 * X),
    "loader": DataLoader(TensorDataset(X, 2 * X), batch_size=2, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_problem(form):
    problem = Problem.of(pyros_way, FORMS[form])
    assert problem.rows == problem.total == 6
    assert torch.equal(observed(problem, "y").float(), 2 * X)
    assert trace(problem).nodes["y"]["fn"].loc.tolist() == X.tolist()


class Pairs(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"x": X[i], "y": 2 * X[i]}


def test_a_map_style_dataset_is_read_by_rows():
    problem = Problem.of(pyros_way, DataLoader(Pairs(), batch_size=4))
    assert (problem.rows, problem.suggested_batch) == (6, 4)
    few = problem.take(torch.tensor([5, 1]))
    assert (few.rows, few.total, few.scale) == (2, 6, 3.0)
    assert few.inputs["x"].tolist() == [5.0, 1.0]
    assert torch.equal(observed(problem, "y"), 2 * X)  # a run of the whole reads all rows


def test_a_loader_keeps_its_own_collation():
    def collate(items):
        return tuple(torch.stack([item[k] for item in items]) * 10 for k in "xy")

    problem = Problem.of(pyros_way, DataLoader(Pairs(), collate_fn=collate))
    assert problem.take(torch.tensor([2])).inputs["x"].tolist() == [20.0]


def test_a_bare_tensor_is_the_first_argument():
    problem = Problem.of(pyros_way, X)
    assert problem.positional == ("x",)
    assert observed(problem, "y") is None


def test_a_single_tensor_dataset_is_its_tensor():
    assert Problem.of(pyros_way, TensorDataset(X)).positional == ("x",)


def test_floats_follow_the_default_dtype_and_arrays_keep_theirs():
    assert Problem.of(pyros_way, {"x": [1.0, 2.0]}).inputs["x"].dtype == torch.float32
    assert Problem.of(pyros_way, {"x": np.array([1.0, 2.0])}).inputs["x"].dtype == torch.float64
    assert Problem.of(pyros_way, {"x": [1, 2]}).inputs["x"].dtype == torch.int64


def test_a_key_that_names_an_argument_and_a_site_is_passed_and_observed():
    def both(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(0.0, 1.0))

    problem = Problem.of(both, {"x": X})
    assert problem.inputs.keys() == {"x"}
    assert torch.equal(observed(problem, "x"), X)


def test_obs_given_by_the_program_stays():
    def own(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x + 1)

    assert torch.equal(observed(Problem.of(own, {"x": X}), "x"), X + 1)


# --- arguments ---


def test_the_number_of_rows_is_passed_where_it_is_asked_for():
    assert len(observed(Problem.of(generative, {"x": X}), "x")) == 6
    assert len(trace(Problem.of(generative, {"x": X}).take(torch.tensor([0, 3]))).nodes["x"]["value"]) == 2
    assert Problem.of(generative, None).rows == 1


def test_n_with_a_default_is_filled_and_others_are_left_alone():
    def program(n=3, scale=2.0):
        with pyro.plate("data", n):
            return pyro.sample("x", dist.Normal(0.0, scale))

    node = trace(Problem.of(program, {"x": X})).nodes["x"]
    assert len(node["value"]) == 6
    assert float(node["fn"].scale.reshape(-1)[0]) == 2.0
    assert len(trace(Problem.of(program, None)).nodes["x"]["value"]) == 3


def test_args_and_kwargs_are_passed_unchanged():
    def program(x, table, scale=1.0):
        assert table == {"a": 1}
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x, scale))

    problem = Problem.of(program, (X,), args=({"a": 1},), kwargs={"scale": 3.0})
    assert float(trace(problem.take(torch.tensor([1]))).nodes["y"]["fn"].scale) == 3.0


@pytest.mark.parametrize(
    "wrap", [lambda f: f, functools.partial, lambda f: poutine.scale(f, scale=1.0), lambda f: Wrapped(f)]
)
def test_any_callable_is_a_program(wrap):
    assert torch.equal(observed(Problem.of(wrap(generative), {"x": X}), "x"), X)


class Wrapped(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, n):
        return self.f(n)


# --- rows ---


def test_rows_are_taken_in_the_order_asked_for():
    problem = Problem.of(pyros_way, (X, 2 * X))
    few = problem.take(torch.tensor([4, 0, 4]))
    assert few.inputs["x"].tolist() == [4.0, 0.0, 4.0]
    assert (few.rows, few.total, few.scale) == (3, 6, 2.0)
    assert few.take(torch.tensor([1])).scale == 6.0
    assert problem.inputs["x"].tolist() == X.tolist()


def test_numbers_have_no_rows():
    problem = Problem.of(generative, {"x": X, "mu": torch.tensor(1.0)})
    assert problem.rows == 6
    assert problem.take(torch.tensor([1])).observations["mu"].ndim == 0
    assert Problem.of(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), {"x": 1.5}).rows is None


def test_forward_runs_nothing_observed_on_any_number_of_rows():
    problem = Problem.of(pyros_way, (X, 2 * X))
    forward = problem.forward(8)
    node = trace(forward).nodes["y"]
    assert not node["is_observed"]
    assert node["fn"].loc.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 1.0]
    assert len(trace(Problem.of(generative, {"x": X}).forward(9)).nodes["x"]["value"]) == 9


def test_with_data_keeps_program_and_arguments():
    problem = Problem.of(pyros_way, (X, 2 * X), kwargs={})
    other = problem.with_data({"x": X[:2]})
    assert (other.rows, other.program) == (2, pyros_way)
    assert observed(other, "y") is None


def test_to_moves_and_casts_floats_only():
    problem = Problem.of(pyros_way, {"x": X, "y": torch.arange(6)}).to(dtype=torch.float64)
    assert problem.inputs["x"].dtype == torch.float64
    assert problem.inputs["y"].dtype == torch.int64
    assert problem.device == torch.device("cpu")


def test_a_problem_is_a_program_that_handlers_understand():
    problem = Problem.of(generative, {"x": X})
    conditioned = poutine.condition(problem, data={"x": X + 1})
    assert torch.equal(
        poutine.trace(conditioned).get_trace().nodes["x"]["value"], X + 1
    )  # the outer handler wins
    assert len(poutine.trace(poutine.block(problem)).get_trace().nodes) == 2


# --- missing values ---


def test_nan_is_missing_and_counts_for_nothing():
    nan = X.clone()
    nan[2] = float("nan")
    problem = Problem.of(generative, {"x": nan})
    assert problem.missing == {"x"}
    found = trace(problem)
    log = found.log_prob_sum()
    assert torch.allclose(log, dist.Normal(0.0, 1.0).log_prob(X[torch.arange(6) != 2]).sum())


def test_missing_elements_of_an_event():
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Gamma(2.0, torch.ones(3)).to_event(1))

    value = torch.ones(4, 3)
    value[1, 2] = float("nan")
    found = trace(Problem.of(program, {"x": value}))
    found.compute_log_prob()
    each = float(dist.Gamma(2.0, 1.0).log_prob(torch.tensor(1.0)))
    assert torch.allclose(found.nodes["x"]["log_prob"], each * torch.tensor([3.0, 2.0, 3.0, 3.0]))


# --- errors ---


class Stream(IterableDataset):
    def __iter__(self):
        return iter([X])


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, i):
        raise IndexError


ERRORS = {
    "empty": (
        generative,
        {"x": torch.zeros(0)},
        r"data 'x' is empty \(shape \(0,\)\); give at least one row",
    ),
    "no rows": (generative, {"x": torch.zeros(0, 3)}, r"data 'x' is empty \(shape \(0, 3\)\)"),
    "empty dataset": (generative, Empty(), "data is empty: Empty has 0 rows"),
    "no length": (
        generative,
        Stream(),
        r"Stream, which has no length.*map-style Dataset \(with __len__ and __getitem__\)",
    ),
    "rows disagree": (
        pyros_way,
        {"x": X, "y": X[:4]},
        r"disagree on the number of rows: 'x' \(6,\), 'y' \(4,\).*args=\(\.\.\.\) or kwargs=\{\.\.\.\}",
    ),
    "infinity in an argument": (
        pyros_way,
        {"x": [1.0, float("inf")]},
        r"'x' \(passed as argument\).*not finite",
    ),
    "infinity at a site": (
        generative,
        {"x": [1.0, float("-inf")]},
        r"'x' \(passed as site\).*only NaN is allowed there, and means missing",
    ),
    "words": (generative, {"x": ["a", "b"]}, "data 'x': list does not make a tensor"),
    "ragged": (generative, {"x": [[1.0], [1.0, 2.0]]}, "data 'x': list does not make a tensor"),
    "a mapping in a mapping": (
        generative,
        {"x": {"y": X}},
        r"data 'x' is dict; expected a tensor.*args=\(\.\.\.\) or kwargs=\{\.\.\.\}",
    ),
    "too many tensors": (
        generative,
        (X, X),
        r"got 2 positional data tensors, but generative takes 1 arguments \(n\)",
    ),
    "no arguments": (lambda: None, X, r"takes 0 arguments \(none\); to observe a site, give a mapping"),
    "a tensor for n": (generative, X, r"generative\(n\) takes the number of examples.*\{'site': tensor\}"),
    "arguments left open": (
        lambda a, b: None,
        None,
        r"still needs 'a', 'b'; give them in the data \(batched by rows\), in args=\(\.\.\.\)",
    ),
    "a problem": (generative, Problem.of(generative, {"x": X}), "data is a Problem already; pass its data"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_data_is_told_with_what_to_do(name):
    program, data, match = ERRORS[name]
    with pytest.raises(DataError, match=match):
        Problem.of(program, data)


def test_asking_about_no_data_at_all_is_no_error():
    assert Problem.of(pyros_way, {"x": X}).observations == {}
