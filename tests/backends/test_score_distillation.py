"""Consistency functions by the score backend: paths of Gaussian laws are known, so what is to be learned is too."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.backends.score import Score
from pgen.backends.score.consistency import Ends, Teacher
from pgen.backends.score.options import TIMES
from pgen.capability import Query
from pgen.distributions import EDM, VE, Diffusion, MixtureDenoiser, Quantized
from pgen.errors import OptionError, Refused, Unanswerable
from pgen.run import Step
from pgen.testing.statistics import StatisticalFailure, assert_mean

LOW, HIGH = 0.02, 20.0
MEAN, SCALE = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 1.5])
RUN = pgen.Run(steps=400, batch_size=500, lr=3e-2, progress=False)


class Denoiser(nn.Module):
    """The denoiser of N(MEAN + shift c, SCALE^2); nothing to learn."""

    def forward(self, x, sigma, context=None):
        v, s2 = SCALE.to(x) ** 2, sigma[:, None] ** 2
        mean = MEAN.to(x) if context is None else MEAN.to(x) + torch.nan_to_num(context)
        return (v * x + s2 * mean) / (v + s2)


class Path(nn.Module):
    """A network that is right for N(mean + pull c, scale^2) in one step to LOW, where paths are known."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.pull = nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma, context=None):
        level, v = sigma[:, None], (2 * self.log_scale).exp()
        mean = self.mean if context is None else self.mean + self.pull * torch.nan_to_num(context)
        end = mean + ((v + LOW**2) / (v + level**2)).sqrt() * (x - mean)
        return x + (end - x) / (1 - LOW / level).clamp(min=1e-4)


def program_of(denoiser, schedule=None, size=2):
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Diffusion(denoiser, schedule or VE(LOW, HIGH), (size,)))

    return program


def conditioned_on(denoiser):
    def program(c, n=None):
        with pyro.plate("data", len(c)):
            pyro.sample("x", Diffusion(denoiser, VE(LOW, HIGH), (2,), context=c))

    return program


@pytest.fixture(scope="module")
def data():
    return {"x": MEAN + SCALE * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def teacher():
    return pgen.fit(program_of(Denoiser()), None, "score")


@pytest.fixture(scope="module")
def student(data, teacher):
    way = pgen.backend("score", loss="consistency", teacher=teacher)
    return pgen.fit(program_of(Path()), data, way, run=RUN, seed=1)


def assert_law(drawn, mean, scale, slack=0.03):
    """Means and variances of the law, but for what students may be off by."""
    for i in range(2):
        assert_mean(drawn[:, i], float(mean[i]), slack=slack)
        assert_mean((drawn[:, i] - mean[i]) ** 2, float(scale[i] ** 2), slack=2 * float(scale[i]) * slack)


# --- what is learned ---


def test_a_student_learns_the_paths_of_its_teacher(student):
    """The teacher's law, not the data's: with 2,000 rows of these, moments are off by 0.03 and more."""
    torch.testing.assert_close(student.parameters["denoiser.mean"], MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(student.parameters["denoiser.log_scale"].exp(), SCALE, atol=0.02, rtol=0)
    assert "x.consistency" in student.history


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_draw_the_law(student, steps):
    drawn = pgen.fit(student.program, None, Score(loss="consistency", steps=steps)).sample(4000, seed=0)["x"]
    assert_law(drawn, MEAN, SCALE)


def test_a_denoiser_is_no_consistency_function(teacher):
    """One step of it goes to the mean of all data, nearly."""
    drawn = pgen.fit(teacher.program, None, Score(loss="consistency", steps=1)).sample(4000, seed=0)["x"]
    with pytest.raises(StatisticalFailure):
        assert_law(drawn, MEAN, SCALE)


def test_data_alone_teach_the_paths_too(data):
    fitted = pgen.fit(program_of(Path()), data, Score(loss="consistency"), run=RUN, seed=1)
    torch.testing.assert_close(fitted.parameters["denoiser.mean"], data["x"].mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(
        fitted.parameters["denoiser.log_scale"].exp(), data["x"].std(0), atol=0, rtol=0.05
    )


def test_guidance_of_the_teacher_is_learned(data):
    """The condition counted twice moves a normal law twice as far: the guided denoiser is that of a normal law."""
    c = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    given = {"c": c, "x": data["x"] + c}
    teacher = pgen.fit(conditioned_on(Denoiser()), given, Score(guidance=2.0))
    way = Score(loss="consistency", teacher=teacher, condition_dropout=0.1)
    fitted = pgen.fit(conditioned_on(Path()), given, way, run=RUN, seed=1)
    assert float(fitted.parameters["denoiser.pull"]) == pytest.approx(2.0, abs=0.05)
    torch.testing.assert_close(fitted.parameters["denoiser.mean"], MEAN, atol=0.05, rtol=0)


def test_teacher_and_student_miss_the_same_conditions(data):
    seen = {"teacher": [], "student": []}

    def watched(who):
        def denoiser(x, sigma, context):
            seen[who].append(context.isnan().any(-1))
            return 0.5 * x

        return denoiser

    batch = {"c": torch.zeros(50, 2), "x": torch.zeros(50, 2)}
    teacher = Teacher.of(pgen.fit(conditioned_on(watched("teacher")), batch, "score"))
    ends = Ends(TIMES["uniform"], teacher, dropout=0.5)
    law = Diffusion(watched("student"), VE(LOW, HIGH), (2,), context=batch["c"])
    problem = teacher.fitted.problem
    torch.manual_seed(0)
    assert ends.at(problem, Step(0, 10))("x", law, batch["x"]).shape == (50,)
    masks = [
        *seen["teacher"][-2:],
        *seen["student"][-2:],
    ]  # Heun asks twice; the student gives aim and answer
    assert 10 < int(masks[0].sum()) < 40
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_replays_give_the_losses_of_the_program_as_written(data, teacher):
    """Over the curriculum's stages, with a step's number that torch sees."""
    way = Score(loss="consistency", teacher=teacher)

    def losses(compile):
        run = pgen.Run(steps=150, batch_size=100, lr=3e-2, progress=False, compile=compile)
        history = pgen.fit(program_of(Path()), data, way, run=run, seed=1).history
        assert not any("as written" in warning for warning in history.warnings)
        return torch.as_tensor(history["loss"])

    torch.testing.assert_close(losses(None), losses(False), rtol=1e-4, atol=1e-5)


def test_learning_starts_from_the_teacher_where_names_and_shapes_are_the_same(data):
    torch.manual_seed(0)
    first = pgen.fit(program_of(Path()), data, "score", run=pgen.Run(steps=5, lr=0.1, progress=False))
    way = Score(loss="consistency", teacher=first)
    begun = pgen.fit(program_of(Path()), data, way, run=pgen.Run(steps=0))
    assert float(first.parameters["denoiser.mean"].abs().min()) > 0
    for name, tensor in first.parameters.items():
        assert torch.equal(begun.parameters[name], tensor)
        assert begun.parameters[name].data_ptr() != tensor.data_ptr()
    other = Path()
    other.mean = nn.Parameter(torch.zeros(1))
    begun = pgen.fit(program_of(other), data, way, run=pgen.Run(steps=0))
    assert torch.equal(begun.parameters["denoiser.mean"], torch.zeros(1))
    assert torch.equal(begun.parameters["denoiser.log_scale"], first.parameters["denoiser.log_scale"])


def test_the_teacher_may_be_of_another_precision(data):
    first = pgen.fit(program_of(Path()), data, "score", run=pgen.Run(steps=2, progress=False))
    run = pgen.Run(steps=2, precision="float64", progress=False)
    fitted = pgen.fit(program_of(Path()), data, Score(loss="consistency", teacher=first), run=run)
    assert fitted.parameters["denoiser.mean"].dtype == torch.float64
    assert fitted.sample(3)["x"].dtype == torch.float64


@pytest.mark.parametrize("taught", [False, True])
def test_whole_numbers_are_learned_behind_their_cells(taught):
    def program_of_cells(denoiser):
        def program(n):
            with pyro.plate("data", n):
                pyro.sample("x", Quantized(Diffusion(denoiser, VE(LOW, HIGH), (2,)), levels=24, low=-12.0))

        return program

    x = torch.floor(2.0 + 1.5 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(3)) + 12).long()
    exact = MixtureDenoiser(torch.full((1, 2), 2.0), scale=1.5)
    teacher = pgen.fit(program_of_cells(exact), None, "score") if taught else None
    way = Score(loss="consistency", teacher=teacher)
    fitted = pgen.fit(program_of_cells(Path()), {"x": x}, way, run=RUN, seed=1)
    torch.testing.assert_close(
        fitted.parameters["denoiser.mean"], torch.full((2,), 2.0), atol=0.02 if taught else 0.15, rtol=0
    )
    drawn = fitted.sample(4000, seed=0)["x"]
    assert drawn.dtype == torch.long
    both = torch.ones(2)
    assert_law(drawn.float() + 0.5 - 12.0, 2.0 * both, 1.5 * both, slack=0.06 if taught else 0.15)


def test_times_may_follow_the_losses(data):
    way = Score(loss="consistency", times="importance")
    fitted = pgen.fit(program_of(Path()), data, way, run=RUN, seed=1)
    torch.testing.assert_close(fitted.parameters["denoiser.mean"], data["x"].mean(0), atol=0.08, rtol=0)


# --- what is offered ---


def test_draws_are_offered_and_nothing_that_takes_a_score(student, data):
    assert set(student.offer.answers) == {Query.SAMPLE}
    assert "no score is learned, so there is no density" in student.offer.why
    with pytest.raises(Unanswerable):
        student.log_prob(data)
    assert torch.equal(student.sample(3, seed=4)["x"], student.sample(9, seed=4)["x"][:3])


def test_a_loaded_student_needs_no_teacher(student, tmp_path):
    student.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", program_of(Path()))
    assert loaded.backend.teacher is None
    assert set(loaded.offer.answers) == {Query.SAMPLE}
    assert torch.equal(loaded.sample(5, seed=1)["x"], student.sample(5, seed=1)["x"])


def test_two_steps_go_with_the_loss():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return 0 * x

    for way, expected in (
        (Score(loss="consistency"), 2),
        (Score(loss="consistency", steps=3, grid="log-snr"), 3),
        (Score(), 32),
    ):
        fitted = pgen.fit(program_of(counted), None, way)
        calls.clear()
        fitted.sample(2)
        assert len(calls) == expected
        assert calls[0] == pytest.approx(HIGH)
        assert min(calls) > LOW or expected == 32, "the last jump is from above the least level"


def test_latents_are_not_inferred_by_it():
    def measured(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(Denoiser(), VE(LOW, HIGH), (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5))

    with pytest.raises(Refused, match=r"data bear upon the latent 'x'.*no score to infer by"):
        pgen.fit(measured, {"y": torch.zeros(3)}, Score(loss="consistency"))


def no_site(n):
    with pyro.plate("data", n):
        pyro.sample("z", Diffusion(Denoiser(), VE(LOW, HIGH), (2,)))


def normal(n):
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def cells(n):
    with pyro.plate("data", n):
        pyro.sample("x", Quantized(Diffusion(Denoiser(), VE(LOW, HIGH), (2,)), levels=5))


@pytest.mark.parametrize(
    ("program", "backend", "said"),
    [
        (no_site, "score", r"has no site 'x'; it has 'z'"),
        (normal, "exact", r"is (Independent|Normal).*, which has no denoiser"),
        (
            program_of(MixtureDenoiser(torch.zeros(1, 3), scale=1.0), size=3),
            "score",
            r"have shape \(3,\), the student's \(2,\)",
        ),
        (cells, "score", "whole numbers, the student's real numbers"),
    ],
    ids=["no site", "no denoiser", "shape", "integers"],
)
def test_teachers_that_cannot_teach_are_refused(data, program, backend, said):
    teacher = pgen.fit(program, None, backend)
    with pytest.raises(Refused, match=said):
        pgen.fit(program_of(Path()), data, Score(loss="consistency", teacher=teacher))


def test_a_student_stays_within_its_teachers_noise_levels(data, teacher):
    way = Score(loss="consistency", teacher=teacher)
    with pytest.raises(
        OptionError, match=r"noise levels from 0.02 to 20, and the student's .* goes from 0.002 to 80"
    ):
        pgen.fit(program_of(Path(), EDM()), data, way, run=RUN)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": 3}, "expected what pgen.fit returned"),
        ({"weighting": "edm"}, "weights of its own"),
        ({"guidance": 2.0}, "guide the teacher"),
        ({"coupling": "optimal-transport"}, "expected 'independent' with loss='consistency'"),
        ({"solver": "heun"}, "an object with `step` that is given a consistency function"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_options_that_do_not_go_with_it_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Score(loss="consistency", **options)


def test_a_teacher_denoises_and_teaches_consistency(student, teacher):
    with pytest.raises(OptionError, match="followed by loss='consistency' alone"):
        Score(teacher=teacher)
    with pytest.raises(OptionError, match="no denoisers to follow"):
        Score(loss="consistency", teacher=student)
