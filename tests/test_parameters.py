"""Learned tensors: found wherever a program keeps them, cloned, and lent for the length of a call."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn.utils import parametrizations

from pgen.errors import CheckpointError
from pgen.parameters import Parameters
from pgen.problem import Problem

X = torch.linspace(-1, 1, 5)[:, None]
SHARED = nn.Linear(1, 1)


def observe(loc, x):
    with pyro.plate("data", len(x)):
        return pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def by_closure(network):
    def program(x):
        return observe(network(x), x)

    return program


def by_global(x):
    return observe(SHARED(x), x)


class Held(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return observe(self.network(x), x)

    def model(self, x):
        return observe(self.network(x), x)


class Plain:
    """No module at all, holding one."""

    def __init__(self, network):
        self.parts = {"network": [network]}

    def __call__(self, x):
        return observe(self.parts["network"][0](x), x)


def with_argument(x, network):
    return observe(network(x), x)


def default_argument(network):
    def program(x, network=network):
        return observe(network(x), x)

    return program


def hidden(network):
    """A module that nothing shows but `pyro.module`."""
    box = iter([network])
    kept = []

    class Opaque:
        __slots__ = ()

        def __call__(self, x):
            if not kept:
                kept.append(_Box(next(box)))
            pyro.module("network", kept[0].open())
            return observe(kept[0].open()(x), x)

    return Opaque()


class _Box:
    __slots__ = ("_content",)

    def __init__(self, content):
        self._content = content

    def open(self):
        return self._content


PLACES = {
    "closure": by_closure,
    "module": Held,
    "bound method": lambda network: Held(network).model,
    "plain object": Plain,
    "partial": lambda network: functools.partial(with_argument, network=network),
    "default argument": lambda network: default_argument(network),
    "decorated": lambda network: functools.wraps(by_closure(network))(lambda x: by_closure(network)(x)),
    "through another function": lambda network: (lambda inner: lambda x: inner(x))(by_closure(network)),
}


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found(place):
    network = nn.Linear(1, 1)
    parameters = Parameters.of(Problem.of(PLACES[place](network), X))
    assert len(parameters.tensors) == 2
    names = sorted(parameters.tensors)
    assert names[0].endswith("bias")
    assert names[1].endswith("weight")
    assert all(
        torch.equal(parameters.tensors[n], p)
        for n, p in zip(names, (network.bias, network.weight), strict=True)
    )
    assert all(t.is_leaf and t.requires_grad for t in parameters.tensors.values())


def test_weights_in_args_and_kwargs_are_found():
    problem = Problem.of(with_argument, (X,), kwargs={"network": nn.Linear(1, 1)})
    assert len(Parameters.of(problem).tensors) == 2


def test_globals_are_found_where_the_program_names_them():
    assert {n.rpartition(".")[2] for n in Parameters.of(Problem.of(by_global, X)).tensors} == {
        "weight",
        "bias",
    }


def test_modules_shown_to_pyro_only_are_found():
    network = nn.Linear(1, 1)
    program = hidden(network)
    parameters = Parameters.of(Problem.of(program, X))
    assert len(parameters.tensors) == 2
    with parameters.installed(), torch.no_grad():
        for t in parameters.tensors.values():
            t.fill_(7.0)
        assert bool((network(X) == 7 * X + 7).all())
    assert not bool((network(X) == 7 * X + 7).any())


def test_other_modules_are_left_out():
    used, unused = nn.Linear(1, 1), nn.Linear(1, 1)

    def program(x):
        return observe(used(x), x)

    assert unused.weight is not None
    assert len(Parameters.of(Problem.of(program, X)).tensors) == 2


# --- clones ---


def test_the_users_weights_are_never_trained():
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    parameters = Parameters.of(Problem.of(by_closure(network), X))
    with torch.no_grad():
        for t in parameters.tensors.values():
            t.add_(1.0)
    assert torch.equal(network.weight, before)
    with parameters.installed():
        assert torch.equal(network.weight, before + 1)
    assert torch.equal(network.weight, before)


def test_two_fits_share_nothing():
    problem = Problem.of(by_closure(nn.Linear(1, 1)), X)
    a, b = Parameters.of(problem), Parameters.of(problem)
    with torch.no_grad():
        next(iter(a.tensors.values())).fill_(9.0)
    assert not bool((next(iter(b.tensors.values())) == 9.0).any())


def test_gradients_reach_the_clones_and_not_the_user():
    network = nn.Linear(1, 1)
    problem = Problem.of(by_closure(network), X)
    parameters = Parameters.of(problem)
    with parameters.installed():
        pyro.poutine.trace(problem).get_trace().log_prob_sum().backward()
    assert all(t.grad is not None for t in parameters.tensors.values())
    assert network.weight.grad is None


def test_everything_is_put_back_when_the_program_raises():
    network = nn.Linear(1, 1)
    mine = network.weight
    parameters = Parameters.of(Problem.of(by_closure(network), X))
    with pytest.raises(ZeroDivisionError), parameters.installed(training=True):
        raise ZeroDivisionError
    assert network.weight is mine
    assert network.training


def test_the_mode_is_lent_and_given_back():
    network = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).eval()
    parameters = Parameters.of(Problem.of(by_closure(network), X))
    with parameters.installed(training=True):
        assert network.training
        assert network[1].training
    assert not network.training
    with parameters.installed(training=False):
        assert not network[1].training


def test_buffers_change_in_the_clone_only():
    network = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    problem = Problem.of(by_closure(network), X)
    parameters = Parameters.of(problem)
    assert sum("running_mean" in n for n in parameters.buffers) == 1
    before = network[1].running_mean.clone()
    with parameters.installed(training=True):
        problem()
    assert torch.equal(network[1].running_mean, before)
    name = next(n for n in parameters.buffers if "running_mean" in n)
    assert not torch.equal(parameters.buffers[name], before)
    assert int(network[1].num_batches_tracked) == 0


def test_frozen_weights_are_kept_and_not_trained():
    network = nn.Linear(1, 1)
    network.bias.requires_grad_(False)
    parameters = Parameters.of(Problem.of(by_closure(network), X))
    assert [n.rpartition(".")[2] for n in parameters.tensors] == ["weight"]
    assert [n.rpartition(".")[2] for n in parameters.buffers] == ["bias"]
    assert network.bias.requires_grad is False


def test_tied_weights_stay_tied():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    parameters = Parameters.of(Problem.of(by_closure(network), X))
    assert len(parameters.tensors) == 3
    with parameters.installed():
        assert first.weight is second.weight
        assert first.weight is not second.bias
    assert first.weight is second.weight


def test_one_module_in_two_places_is_one():
    network = nn.Linear(1, 1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = network

        def forward(self, x):
            return observe(self.a(x) + self.b(x), x)

    assert len(Parameters.of(Problem.of(Twice(), X)).tensors) == 2


def test_parametrized_modules_work():
    network = parametrizations.weight_norm(nn.Linear(1, 1))
    problem = Problem.of(by_closure(network), X)
    parameters = Parameters.of(problem)
    assert len(parameters.tensors) == 3
    with parameters.installed():
        pyro.poutine.trace(problem).get_trace().log_prob_sum().backward()
    assert all(t.grad is not None for t in parameters.tensors.values())


# --- pyro.param ---


def with_params(n):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(loc, scale))


def test_params_are_found_and_the_store_is_left_alone():
    problem = Problem.of(with_params, {"x": X[:, 0]})
    parameters = Parameters.of(problem)
    assert set(parameters.tensors) == {"loc", "scale"}
    assert list(pyro.get_param_store()) == []
    assert parameters.tensors["scale"].item() == pytest.approx(torch.tensor(2.0).log().item())
    with torch.no_grad():
        parameters.tensors["scale"].fill_(0.0)
    with parameters.installed():
        node = pyro.poutine.trace(problem).get_trace().nodes["x"]
        assert torch.allclose(node["fn"].scale, torch.ones(()))
        assert list(pyro.get_param_store()) == ["loc", "scale"]
    assert list(pyro.get_param_store()) == []


def test_the_users_own_params_are_not_taken():
    pyro.param("loc", torch.tensor(42.0))
    try:
        parameters = Parameters.of(Problem.of(with_params, {"x": X[:, 0]}))
        assert parameters.tensors["loc"].item() == 0.5
        assert pyro.param("loc").item() == 42.0
    finally:
        pyro.clear_param_store()


def test_pyro_modules_with_params_and_samples():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                return pyro.sample("x", dist.Normal(self.w * x, self.scale).to_event(1), obs=x)

    model = Model()
    problem = Problem.of(model, X)
    parameters = Parameters.of(problem)
    assert len(parameters.tensors) == 1
    with parameters.installed():
        trace = pyro.poutine.trace(problem).get_trace()
        trace.log_prob_sum().backward()
    (tensor,) = parameters.tensors.values()
    assert tensor.grad is not None
    assert list(pyro.get_param_store()) == []
    assert model.scale.item() == pytest.approx(2.0)


def test_owners_are_searched_under_their_prefix():
    guide = nn.Linear(1, 2)
    problem = Problem.of(by_closure(nn.Linear(1, 1)), X)
    names = set(Parameters.of(problem, owners={"guide": guide}).tensors)
    assert {"guide.weight", "guide.bias"} <= names
    assert len(names) == 4


# --- state ---


def test_state_goes_round():
    problem = Problem.of(by_closure(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))), X)
    first, second = Parameters.of(problem), Parameters.of(problem)
    with torch.no_grad():
        for t in first.tensors.values():
            t.uniform_()
    state = first.state()
    second.load(state)
    assert all(torch.equal(v, second.state()[k]) for k, v in state.items())
    assert all(not v.requires_grad for v in state.values())
    assert all(t.requires_grad and t.is_leaf for t in second.tensors.values())


def test_state_is_a_copy():
    parameters = Parameters.of(Problem.of(by_closure(nn.Linear(1, 1)), X))
    state = parameters.state()
    with torch.no_grad():
        for t in parameters.tensors.values():
            t.add_(1)
    assert not any(torch.equal(v, parameters.state()[k]) for k, v in state.items())


def test_another_programs_state_is_refused():
    parameters = Parameters.of(Problem.of(by_closure(nn.Linear(1, 1)), X))
    state = parameters.state()
    with pytest.raises(
        CheckpointError, match=r"lacks \['network.bias'\].*load with the program that was fitted"
    ):
        parameters.load({"network.weight": state["network.weight"]})
    with pytest.raises(CheckpointError, match=r"\['more'\] more"):
        parameters.load({**state, "more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"'network.bias' has shape \(2,\), the program's has \(1,\)"):
        parameters.load({**state, "network.bias": torch.zeros(2)})


def test_frozen_twins_learn_nothing():
    problem = Problem.of(by_closure(nn.Linear(1, 1)), X)
    parameters = Parameters.of(problem)
    with parameters.frozen().installed():
        assert not pyro.poutine.trace(problem).get_trace().log_prob_sum().requires_grad
    assert all(t.requires_grad for t in parameters.tensors.values())


def test_casting_keeps_leaves():
    parameters = Parameters.of(Problem.of(by_closure(nn.Linear(1, 1)), X)).to(dtype=torch.float64)
    assert all(
        t.dtype == torch.float64 and t.requires_grad and t.is_leaf for t in parameters.tensors.values()
    )


def test_constraints_are_known():
    parameters = Parameters.of(Problem.of(with_params, {"x": X[:, 0]}))
    assert parameters.constraint("scale") is dist.constraints.positive
    assert parameters.constraint("nothing") is None
