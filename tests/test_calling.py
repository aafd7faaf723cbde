"""The name and the arguments of a program, seen through handlers and wrappers; and that fits see them."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from torch import nn

import pgen
from pgen.calling import is_required, name_of, parameters_of, signature_of
from pgen.errors import DataError
from pgen.inspection import structure_of


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def passed_on(program):
    @functools.wraps(program)
    def wrapper(*args, **kwargs):
        return program(*args, **kwargs)

    return wrapper


class Module(pyro.nn.PyroModule):
    @poutine.scale(scale=1.0)
    def forward(self, x, y=None):
        return regression(x, y)


class Object:
    @poutine.mask(mask=True)
    def run(self, x, y=None):
        return regression(x, y)

    def __call__(self, x, y=None):
        return regression(x, y)


decentred = poutine.reparam(config={"slope": LocScaleReparam(0.0)})

WAYS = {
    "reparam": decentred(regression),
    "reparam, called": poutine.reparam(regression, config={}),
    "condition": poutine.condition(data={})(regression),
    "mask": poutine.mask(mask=True)(regression),
    "scale": poutine.scale(scale=1.0)(regression),
    "block": poutine.block(hide=["slope"])(regression),
    "trace": poutine.trace()(regression),
    "plate": pyro.plate("outer", 2)(regression),
    "enumerate": config_enumerate(regression),
    "three of them": poutine.mask(mask=True)(decentred(poutine.scale(scale=1.0)(regression))),
    "a handler of a wrapper": decentred(passed_on(regression)),
    "a wrapper of a handler": passed_on(decentred(regression)),
    "a handler of an object": poutine.mask(mask=True)(Object()),
    "a handler of a module": decentred(Module()),
    "a decorated method": Object().run,
    "a decorated forward": Module(),
}


@pytest.mark.parametrize("way", WAYS)
def test_arguments_are_those_of_the_program_within(way):
    assert str(signature_of(WAYS[way])) == "(x, y=None)"
    assert parameters_of(WAYS[way]) == (["x", "y"], False)
    assert is_required(WAYS[way], "x")
    assert not is_required(WAYS[way], "y")


def test_arguments_that_partial_has_filled_are_gone():
    assert parameters_of(functools.partial(decentred(regression), torch.ones(2))) == (["y"], False)
    assert parameters_of(poutine.mask(mask=True)(functools.partial(regression, torch.ones(2)))) == (
        ["y"],
        False,
    )
    assert not is_required(functools.partial(decentred(regression), x=torch.ones(2)), "x")


def test_names_are_those_of_the_program_within():
    assert name_of(decentred(regression)) == name_of(poutine.mask(mask=True)(regression)) == "regression"
    assert name_of(poutine.mask(mask=True)(Object())) == "Object"


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize("way", ["reparam", "mask", "three of them", "a decorated forward"])
def test_data_reaches_a_decorated_program_by_name(way):
    structure = structure_of(WAYS[way], {"x": X, "y": X})
    assert structure.observed == ("y",)
    assert structure.data_plates == ("rows",)


def test_weights_under_a_decorator_are_learned_and_saved(tmp_path):
    network = nn.Linear(1, 1)

    @poutine.reparam(config={})
    def program(x, y=None):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(network(x[:, None])[:, 0], 1.0), obs=y)

    fitted = pgen.fit(program, {"x": X, "y": 2 * X + 1}, "exact", seed=0)
    learned = fitted.parameters
    assert torch.allclose(
        torch.cat([v.flatten() for v in learned.values()]), torch.tensor([2.0, 1.0]), atol=1e-2
    )
    assert name_of(fitted.program) == "program"
    fitted.save(tmp_path / "fit")
    again = pgen.load(tmp_path / "fit", program).parameters
    assert all(torch.equal(again[k], v) for k, v in learned.items())


def test_a_wrapper_that_hides_its_arguments_is_told_how_to_show_them():
    def hidden(*args, **kwargs):
        return regression(*args, **kwargs)

    with pytest.raises(DataError, match=r"takes \*\*kwargs.*functools\.wraps"):
        structure_of(hidden, {"x": X, "slope": torch.tensor(0.0)}, args=(X,))
