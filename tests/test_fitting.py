"""`fit`, `explain`, `load`, `backend`: where program, data, backend and run meet."""

import threading
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pgen
from pgen.capability import Capability, Estimate, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import names_of, require
from pgen.conversion import Converted
from pgen.errors import DataError, OptionError, ProgramError, Refused, UnknownName
from pgen.history import History
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.run import Run
from pgen.sampling import draw
from pgen.testing.subject import changed, observe

X = torch.tensor([0.5, -1.0, 2.0, 0.25])


def program(n):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(loc, 1.0))


@dataclass(frozen=True)
class Mean:
    """Learns a mean, by steps of a random walk that it then forgets; records what it was given."""

    name: ClassVar[str] = "mean"

    jitter: float = 0.0
    via: Any = field(default_factory=dict)
    seen: dict = field(default_factory=dict, compare=False)

    def examine(self, structure):
        paths = require(structure, observed=[Capability.LOG_PROB], via=self.via)
        if isinstance(paths, Refusal):
            return paths
        return Offer(
            {Query.SAMPLE: Exactness.EXACT, Query.LOG_PROB: Exactness.EXACT},
            Rank.SUITED,
            "it is a mean",
            names_of(paths),
        )

    def fit(self, problem, structure, run):
        self.seen.update(problem=problem, structure=structure, run=run, store=list(pyro.get_param_store()))
        return MeanAnswers(self, problem, structure, run)


class MeanAnswers:
    def __init__(self, backend, problem, structure, run):
        self.problem, self.structure = problem, structure
        self.parameters = Parameters.of(problem)
        self.history = History(steps=run.steps or 0, seed=run.seed)
        if run.steps is None or run.steps:
            with torch.no_grad():
                self.parameters.tensors["loc"].copy_(
                    problem.observations["x"].mean() + backend.jitter * torch.randn(())
                )

    def sample(self, n):
        with self.parameters.installed():
            return draw(self.problem, self.structure, n)

    def log_prob(self, problem, structure):
        with self.parameters.installed():
            trace = pyro.poutine.trace(problem).get_trace()
        trace.compute_log_prob()
        return Estimate(trace.nodes["x"]["log_prob"], "exact", measure=structure.measure, dims=1)

    def tensors(self):
        return self.parameters.state()

    def load(self, tensors):
        self.parameters.load(tensors)


def test_a_fit_is_what_the_backend_learned():
    fitted = pgen.fit(program, {"x": X}, Mean(), seed=3)
    assert torch.allclose(fitted.log_prob().value, dist.Normal(X.mean(), 1.0).log_prob(X))
    assert fitted.parameters["loc"].item() == pytest.approx(X.mean().item())
    assert fitted.seed == 3
    assert fitted.backend == Mean()
    assert fitted.offer.answers[Query.LOG_PROB] is Exactness.EXACT


def test_the_backend_is_given_the_bound_problem_its_structure_and_the_run():
    backend = Mean()
    pgen.fit(program, {"x": X}, backend, run=Run(steps=7), seed=11)
    seen = backend.seen
    assert (seen["run"].steps, seen["run"].seed) == (7, 11)
    assert isinstance(seen["problem"], Problem)
    assert seen["structure"].data_plate == "data"
    assert {"density", "autograd-score"} <= {c.name for c in seen["structure"].conversions}
    assert seen["store"] == []


def test_without_a_seed_that_of_the_run_is_taken():
    assert pgen.fit(program, {"x": X}, Mean(), run=Run(seed=5)).seed == 5
    assert pgen.fit(program, {"x": X}, Mean(), run=Run(seed=5), seed=6).seed == 6


def test_the_same_seed_gives_the_same_fit_and_another_another():
    first, second, third = (
        pgen.fit(program, {"x": X}, Mean(jitter=1.0), seed=s).parameters["loc"] for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fitting_leaves_no_trace():
    network = nn.Linear(1, 1)

    def with_network(n):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(loc + network.bias, 1.0))

    before, weights, data = observe(), network.bias.clone(), X.clone()
    fitted = pgen.fit(with_network, {"x": data}, Mean())
    fitted.sample(3)
    fitted.log_prob()
    assert changed(before, observe()) == []
    assert torch.equal(network.bias, weights)
    assert torch.equal(data, X)
    assert data._version == 0


def test_data_may_be_absent():
    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    @dataclass(frozen=True)
    class Forward(Mean):
        def examine(self, structure):
            return Offer({Query.SAMPLE: Exactness.EXACT}, Rank.SUITED, "it runs forward")

        def fit(self, problem, structure, run):
            return ForwardAnswers(self, problem, structure, replace(run, steps=0))

    class ForwardAnswers(MeanAnswers):
        pass

    fitted = pgen.fit(prior, None, Forward())
    assert fitted.sample(5)["z"].shape == (5,)


# --- conversions ---


class Energy(dist.TorchDistribution):
    """An unnormalised law on {0, 1}."""

    arg_constraints: ClassVar = {}
    capabilities = frozenset({Capability.LOG_DENSITY, Capability.ENUMERATE})
    has_enumerate_support = True
    support = dist.constraints.boolean

    def __init__(self, tilt):
        self.tilt = tilt
        super().__init__(tilt.shape, validate_args=False)

    def log_density(self, value):
        return self.tilt * value

    def enumerate_support(self, expand=True):
        values = torch.tensor([0.0, 1.0]).reshape(2, *[1] * len(self.batch_shape))
        return values.expand(2, *self.batch_shape) if expand else values

    def expand(self, batch_shape, _instance=None):
        return Energy(self.tilt.expand(batch_shape))


def tilted(n):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", n):
        pyro.sample("x", Energy((loc + 1.0).expand(n)))


def test_the_conversions_of_the_offer_are_applied():
    backend = Mean()
    fitted = pgen.fit(tilted, {"x": torch.tensor([1.0, 0.0, 1.0])}, backend, run=Run(steps=0))
    assert fitted.offer.paths == {"x": ("exact-sum",)}
    with pyro.get_param_store().scope():
        law = pyro.poutine.trace(backend.seen["problem"]).get_trace().nodes["x"]["fn"]
    assert isinstance(law, Converted)
    expected = torch.tensor([0.0, 1.0]).log_softmax(0)[torch.tensor([1, 0, 1])]
    assert torch.allclose(fitted.log_prob().value, expected)
    assert torch.allclose(fitted.log_prob({"x": torch.zeros(2)}).value, expected[1])


def test_conversions_asked_for_by_hand_are_used_or_refused_by_name():
    fitted = pgen.fit(program, {"x": X}, Mean(via={"x": "density"}))
    assert fitted.offer.paths == {"x": ("density",)}
    with pytest.raises(OptionError, match="via names the site 'y'"):
        pgen.fit(program, {"x": X}, Mean(via={"y": "density"}))
    with pytest.raises(UnknownName, match="no conversion 'dens'"):
        pgen.fit(program, {"x": X}, Mean(via={"x": "dens"}))


# --- refusals and errors ---


def test_a_refusal_is_an_error_that_carries_it():
    @dataclass(frozen=True)
    class Never(Mean):
        def examine(self, structure):
            return Refusal("x", "charm", "it is dull")

    with pytest.raises(
        Refused, match="backend 'mean' cannot fit program: site 'x' lacks charm: it is dull"
    ) as caught:
        pgen.fit(program, {"x": X}, Never())
    assert caught.value.refusal == Refusal("x", "charm", "it is dull")


def test_an_unknown_backend_is_told_with_the_nearest():
    with pytest.raises(UnknownName, match="no backend is called 'variatonal'; did you mean 'variational'"):
        pgen.fit(program, {"x": X}, "variatonal")
    with pytest.raises(UnknownName, match="did you mean 'exact'"):
        pgen.backend("exct")


def test_an_unknown_option_is_told_with_the_nearest():
    with pytest.raises(
        OptionError, match=r"backend 'exact' has no option 'vai'; did you mean 'via'\? Its options: .*via"
    ):
        pgen.backend("exact", vai={})


def test_bad_data_and_programs_are_told_before_any_work():
    backend = Mean()
    with pytest.raises(DataError, match="names neither an argument nor a site"):
        pgen.fit(program, {"y": X}, backend)
    with pytest.raises(DataError, match="is empty"):
        pgen.fit(program, {"x": torch.zeros(0)}, backend)

    def broken(n):
        raise KeyError("oh")

    with pytest.raises(ProgramError, match="broken raised KeyError before its first site: 'oh'"):
        pgen.fit(broken, {"x": X}, backend)
    assert backend.seen == {}


def test_threads_take_turns():
    found, errors = {}, []

    def work(i):
        try:
            fitted = pgen.fit(program, {"x": X + i}, Mean())
            found[i] = (fitted.log_prob().value.sum().item(), fitted.sample(3)["x"].shape)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    expected = dist.Normal(X.mean(), 1.0).log_prob(X).sum().item()
    assert [found[i][0] for i in range(8)] == pytest.approx([expected] * 8, rel=1e-4)


def test_explain_asks_everyone_installed():
    explanation = pgen.explain(program, {"x": X})
    assert {"exact", "variational"} <= {row.backend for row in explanation}
    row = explanation["exact"]
    assert row.offered
    assert isinstance(row.answer, Offer)
    assert "Structure of program" in str(explanation)


# --- saving and loading ---


def test_a_fit_comes_back(tmp_path):
    fitted = pgen.fit(program, {"x": X}, Mean(jitter=1.0), seed=4, run=Run(steps=9))
    fitted.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", program, backend=Mean(jitter=1.0))
    assert torch.equal(loaded.parameters["loc"], fitted.parameters["loc"])
    assert torch.equal(loaded.log_prob().value, fitted.log_prob().value)
    assert torch.equal(loaded.sample(4, seed=1)["x"], fitted.sample(4, seed=1)["x"])
    assert (loaded.seed, loaded.history.steps) == (4, 9)
    loaded.save(tmp_path / "again")
    again = pgen.load(tmp_path / "again", program, backend=Mean(jitter=1.0))
    assert torch.equal(again.log_prob().value, fitted.log_prob().value)


def test_another_program_is_told_apart(tmp_path):
    pgen.fit(program, {"x": X}, Mean()).save(tmp_path / "fit")

    def other(n):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Laplace(loc, 1.0))

    with pytest.raises(pgen.errors.CheckpointError, match="load with the program that was fitted"):
        pgen.load(tmp_path / "fit", other, backend=Mean())


def test_an_option_that_no_file_can_hold_is_asked_for(tmp_path):
    backend = Mean(via={}, seen={"callback": print})
    pgen.fit(program, {"x": X}, backend).save(tmp_path / "fit")
    with pytest.raises(
        pgen.errors.CheckpointError,
        match=r"option 'seen' of backend 'mean'.*give the backend again: pgen.load\(path, program, backend=",
    ):
        pgen.load(tmp_path / "fit", program)


def test_an_argument_that_no_file_can_hold_is_asked_for(tmp_path):
    def scaled(n, law):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", n):
            pyro.sample("x", law(loc, 1.0))

    pgen.fit(scaled, {"x": X}, Mean(), kwargs={"law": dist.Normal}).save(tmp_path / "fit")
    with pytest.raises(
        pgen.errors.CheckpointError,
        match=r"in kwargs, which a file cannot hold; give it again: pgen.load\(path, program, kwargs=",
    ):
        pgen.load(tmp_path / "fit", scaled, backend=Mean())
    loaded = pgen.load(tmp_path / "fit", scaled, backend=Mean(), kwargs={"law": dist.Normal})
    assert loaded.log_prob().value.shape == (4,)


def test_a_file_names_backends_and_nothing_else(tmp_path):
    pgen.fit(program, {"x": X}, Mean()).save(tmp_path / "fit")
    with pytest.raises((UnknownName, pgen.errors.CheckpointError)):  # `mean` is not installed
        pgen.load(tmp_path / "fit", program)
    with pytest.raises(pgen.errors.CheckpointError, match="fitted by backend 'mean', not 'exact'"):
        pgen.load(tmp_path / "fit", program, backend=pgen.backend("exact"))


def test_a_flipped_byte_is_found(tmp_path):
    pgen.fit(program, {"x": X}, Mean()).save(tmp_path / "fit")
    file = next((tmp_path / "fit").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(pgen.errors.CheckpointError):
        pgen.load(tmp_path / "fit", program, backend=Mean())


def test_large_data_stay_out_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pgen.saving._KEEP_BYTES", 8)
    fitted = pgen.fit(program, {"x": X}, Mean())
    fitted.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", program, backend=Mean())
    with pytest.raises(OptionError, match="saved without its training data.*give the data"):
        loaded.log_prob()
    assert torch.equal(loaded.log_prob({"x": X}).value, fitted.log_prob().value)
    loaded.save(tmp_path / "again")
    assert torch.equal(
        pgen.load(tmp_path / "again", program, backend=Mean()).parameters["loc"], fitted.parameters["loc"]
    )


def test_datasets_stay_out_of_the_file(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"x": torch.tensor(float(i))}

    fitted = pgen.fit(program, Rows(), Mean(), run=Run(steps=0))
    fitted.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", program, backend=Mean())
    assert torch.equal(loaded.log_prob({"x": X}).value, fitted.log_prob({"x": X}).value)


def test_what_is_evaluated_again_on_the_way_back_finds_what_is_learned():
    """A program may save memory by checkpoints: the gradient is that of the tensors that are being learned."""

    class Checkpointed(nn.Module):
        def __init__(self, kept):
            super().__init__()
            self.kept, self.w = kept, nn.Parameter(torch.tensor(0.0))

        def shifted(self, c):
            return (self.w * c).tanh() * c

        def forward(self, c):
            mean = self.shifted(c) if self.kept else checkpoint(self.shifted, c, use_reentrant=False)
            with pyro.plate("data", len(c)):
                pyro.sample("y", dist.Normal(mean, 1.0))

    c = torch.linspace(-2, 2, 50)
    found = [
        pgen.fit(
            Checkpointed(kept),
            {"c": c, "y": 0.7 * c.abs()},
            backend,
            run=pgen.Run(steps=30, lr=0.05, batch_size=50, progress=False),
        ).parameters["w"]
        for backend in ("exact", "variational")
        for kept in (True, False)
    ]
    assert float(found[0]) > 0.2
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
