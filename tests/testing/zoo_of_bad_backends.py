"""Backends that are wrong in one way each, and a good one: every check of the kit can fail, and need not.

`Oracle` knows the exact answers of the reference problems. Each specimen spoils one thing, and says in
`BREAKS` which checks must notice, and no other may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pgen.capability import Estimate, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import learned_factor
from pgen.draws import Draws
from pgen.history import History
from pgen.parameters import Parameters
from pgen.sampling import draw, observed_scalars
from pgen.testing import problems

REFERENCES = {
    getattr(p.program, "__name__", type(p.program).__name__): p
    for p in (*problems.SUITED, *problems.DENOISED, *problems.ENERGIES, *problems.LEARNED)
}
EXACTLY = dict.fromkeys(Query, Exactness.EXACT)


@dataclass(frozen=True)
class Oracle:
    """The good one: answers out of the book."""

    name: ClassVar[str] = "oracle"

    note: str = ""
    via: Mapping[str, str] = field(default_factory=dict)

    def examine(self, structure):
        refusal = learned_factor(structure)
        if refusal is not None:
            return refusal
        if structure.name not in REFERENCES:
            return Refusal(
                next(iter(structure.sites)),
                "a known answer",
                f"nothing about {structure.name} is in the book",
            )
        answers = dict(EXACTLY)
        if not structure.latents:
            answers = {q: e for q, e in answers.items() if q not in (Query.POSTERIOR, Query.MARGINALS)}
        return Offer(answers, Rank.IDEAL, "its answers are in the book")

    def fit(self, problem, structure, run):
        return self.answers(problem, structure, run)

    def answers(self, problem, structure, run):
        return OracleAnswers(self, problem, structure, run)


class OracleAnswers:
    def __init__(self, backend, problem, structure, run):
        self.backend, self.problem, self.structure = backend, problem, structure
        self.reference = REFERENCES[structure.name]
        self.history = History(seed=run.seed)
        self.parameters = Parameters.of(problem)
        if (
            self.parameters.tensors and run.steps
        ):  # the one program that learns has its optimum in closed form
            x = problem.observations["x"]
            with torch.no_grad():
                self.parameters.tensors["loc"].copy_(x.mean())
                self.parameters.tensors["log_scale"].copy_(x.std(correction=0).log())

    def sample(self, n):
        if self.problem.undrawable:  # pgen leaves it to backends how a denoiser is drawn from
            nodes = poutine.trace(self.problem.program).get_trace(n).nodes
            return {site: nodes[site]["value"] for site in self.structure.sites}
        with self.parameters.installed():
            return draw(self.problem, self.structure, n)

    def log_prob(self, problem, structure):
        dims = observed_scalars(problem, structure)
        return Estimate(self.log_prob_of(problem), Exactness.EXACT, measure=structure.measure, dims=dims)

    def log_prob_of(self, problem):
        data = data_of(problem)
        if self.reference.log_prob is None:
            t = self.parameters.tensors
            return dist.Normal(t["loc"], t["log_scale"].exp()).log_prob(data["x"]).detach()
        values = self.reference.log_prob(data)
        return values if any(v.dtype == torch.float64 for v in data.values()) else values.float()

    def posterior(self, problem, structure, n):
        return Draws(
            {
                k: v.float() if v.is_floating_point() else v
                for k, v in self.joint_draws(data_of(problem), n).items()
            }
        )

    def joint_draws(self, data, n):
        if self.reference.name == "regression":
            return {"w": dist.MultivariateNormal(*problems._regression_moments(data)).sample((n,))}
        if self.reference.name == "denoised-latent":
            means, covariance, weights = problems.denoised.posterior(data)
            each = dist.MultivariateNormal(means, covariance)
            return {"z": torch.distributions.MixtureSameFamily(dist.Categorical(weights), each).sample((n,))}
        if self.reference.name == "hmm":
            path = dist.Categorical(logits=problems._hmm_path_table(data)).sample((n,))
            return {f"z{t}": problems._paths()[0][path, t] for t in range(3)}
        return {site: law.sample((n,)) for site, law in self.reference.posterior(data).items()}

    def marginals(self, problem, structure):
        return self.reference.posterior(data_of(problem))

    def tensors(self):
        return self.parameters.state()

    def load(self, tensors):
        self.parameters.load(tensors)


def data_of(problem):
    return {**problem.inputs, **problem.observations}


#: the specimens: what to spoil it, the checks that must fail, and the problems it is shown on
SPECIMENS: dict[str, tuple[Any, set[str], tuple[str, ...]]] = {}


def specimen(*breaks, on=("linear-gaussian",)):
    def add(kind):
        SPECIMENS[kind.__name__] = (kind, set(breaks), on)
        return kind

    return add


def answering(**methods):
    """An Oracle whose answers have other methods."""
    kind = type("Spoilt", (OracleAnswers,), methods)

    def answers(self, problem, structure, run):
        return kind(self, problem, structure, run)

    return answers


def offering(**changes):
    """An `examine` like the Oracle's, the offer changed."""

    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        if isinstance(answer, Refusal):
            return answer
        return replace(answer, **{k: v(answer) if callable(v) else v for k, v in changes.items()})

    return examine


def promising(**exactness):
    return lambda offer: {
        **offer.answers,
        **{Query(k): Exactness(v) for k, v in exactness.items() if Query(k) in offer.answers},
    }


# --- form ---


@specimen("is_a_frozen_dataclass")
@dataclass
class NotFrozen(Oracle.__mro__[-1]):
    name: ClassVar[str] = "not-frozen"
    note: str = ""
    examine, fit, answers = Oracle.examine, Oracle.fit, Oracle.answers


@specimen("is_a_frozen_dataclass")
@dataclass(frozen=True)
class PrintsItsAddress(Oracle):
    def __repr__(self):
        return object.__repr__(self)


@specimen("is_a_frozen_dataclass")
@dataclass(frozen=True)
class ForgetsAnOption(Oracle):
    note: str = "kept"

    def __post_init__(self):
        object.__setattr__(self, "note", self.note + "!")


@specimen("serves_something")
@dataclass(frozen=True)
class RefusesEverything(Oracle):
    def examine(self, structure):
        return Refusal(next(iter(structure.sites)), "charm", "it would rather not")


@specimen("says_what_it_offers_or_lacks", on=("implicit", "linear-gaussian"))
@dataclass(frozen=True)
class RefusesWithoutReason(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        return replace(answer, why=" ") if isinstance(answer, Refusal) else answer


@specimen("says_what_it_offers_or_lacks", on=("implicit", "linear-gaussian"))
@dataclass(frozen=True)
class RecommendsAnother(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        if isinstance(answer, Refusal):
            return replace(answer, why=f"{structure.name} is too hard; use backend='variational'")
        return answer


@specimen("says_what_it_offers_or_lacks", on=("implicit", "linear-gaussian"))
@dataclass(frozen=True)
class NamesASiteThatIsNotThere(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        return replace(answer, site="zz") if isinstance(answer, Refusal) else answer


@specimen("says_what_it_offers_or_lacks", "fits_and_answers")
@dataclass(frozen=True)
class OffersInItsOwnWords(Oracle):
    examine = offering(paths=lambda offer: {"z": ("abracadabra",)})


@specimen("says_what_it_offers_or_lacks")
@dataclass(frozen=True)
class RanksByNumber(Oracle):
    examine = offering(rank=2)


@specimen("refuses_what_it_cannot_serve", on=("learned-energy", "linear-gaussian"))
@dataclass(frozen=True)
class TakesTheLearnedEnergy(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        if structure.factors:
            return Offer({Query.SAMPLE: Exactness.ESTIMATE}, Rank.POSSIBLE, "why not")
        return answer


@specimen("refuses_what_it_cannot_serve", on=("implicit", "linear-gaussian"))
@dataclass(frozen=True)
class CrashesOnImplicitSites(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        if structure.name == "implicit":
            return Offer({Query.SAMPLE: Exactness.EXACT}, Rank.POSSIBLE, "it looks easy")
        return answer

    def fit(self, problem, structure, run):
        if structure.name == "implicit":
            raise NotImplementedError("log_prob")
        return self.answers(problem, structure, run)


@specimen("refuses_what_it_cannot_serve", on=("implicit", "linear-gaussian"))
@dataclass(frozen=True)
class RefusesVaguely(Oracle):
    def examine(self, structure):
        answer = Oracle.examine(self, structure)
        return replace(answer, site=None) if structure.name == "implicit" else answer


@specimen("fits_and_answers")
@dataclass(frozen=True)
class CrashesAfterOffering(Oracle):
    def fit(self, problem, structure, run):
        raise RuntimeError("matrix is singular")


@specimen("fits_and_answers")
@dataclass(frozen=True)
class CrashesWhenAsked(Oracle):
    def posterior(self, problem, structure, n):
        raise ZeroDivisionError

    answers = answering(posterior=posterior)


@specimen("fits_in_no_steps", "survives_saving")
@dataclass(frozen=True)
class NeedsSteps(Oracle):
    def fit(self, problem, structure, run):
        answers = self.answers(problem, structure, run)
        if not run.steps:
            answers.log_prob = None
        return answers


@specimen("fits_and_answers", "answers_only_what_it_offered")
@dataclass(frozen=True)
class OffersAQueryItLacks(Oracle):
    answers = answering(marginals=property())  # hasattr says no


@specimen("answers_only_what_it_offered")
@dataclass(frozen=True)
class AnswersMoreExactly(Oracle):
    examine = offering(answers=promising(log_prob="estimate"))


# --- manners ---


@specimen("examines_without_a_trace")
@dataclass(frozen=True)
class RollsDiceWhenAsked(Oracle):
    def examine(self, structure):
        torch.rand(())
        return Oracle.examine(self, structure)


@specimen("examines_without_a_trace")
@dataclass(frozen=True)
class LeaksAParamWhenAsked(Oracle):
    def examine(self, structure):
        pyro.param("leaked", torch.zeros(()))
        return Oracle.examine(self, structure)


@specimen("examines_without_a_trace")
@dataclass(frozen=True)
class WritesIntoTheGraph(Oracle):
    def examine(self, structure):
        structure.graph.add_node("mine")
        return Oracle.examine(self, structure)


@specimen("examines_without_a_trace")
@dataclass(frozen=True)
class ChangesItsMind(Oracle):
    asked: ClassVar[list] = []

    def examine(self, structure):
        self.asked.append(1)
        return offering(why=f"for the {len(self.asked)}th time")(self, structure)


@specimen("leaves_global_state_alone")
@dataclass(frozen=True)
class ChangesDefaultDtype(Oracle):
    def fit(self, problem, structure, run):
        torch.set_default_dtype(torch.float64)
        return self.answers(problem, structure, run)


@specimen("leaves_global_state_alone")
@dataclass(frozen=True)
class SwitchesValidationOff(Oracle):
    def posterior(self, problem, structure, n):
        torch.distributions.Distribution.set_default_validate_args(False)
        return OracleAnswers.posterior(self, problem, structure, n)

    answers = answering(posterior=posterior)


@specimen("leaves_global_state_alone")
@dataclass(frozen=True)
class SetsAPyroSetting(Oracle):
    def fit(self, problem, structure, run):
        pyro.settings.set(validate_infer=not pyro.settings.get("validate_infer"))
        return self.answers(problem, structure, run)


@specimen("leaves_global_state_alone")
@dataclass(frozen=True)
class LeavesAHandlerBehind(Oracle):
    def fit(self, problem, structure, run):
        pyro.poutine.runtime._PYRO_STACK.append(pyro.poutine.block_messenger.BlockMessenger(hide=[]))
        return self.answers(problem, structure, run)


@specimen("leaves_inputs_alone")
@dataclass(frozen=True)
class StandardisesTheDataInPlace(Oracle):
    def fit(self, problem, structure, run):
        answers = self.answers(problem, structure, run)
        problem.observations["x"].mul_(2.0).mul_(0.5)
        return answers


@specimen("leaves_inputs_alone", on=("learned-gaussian",))
@dataclass(frozen=True)
class TrainsTheUsersWeights(Oracle):
    def fit(self, problem, structure, run):
        with torch.no_grad():
            problem.program.loc.fill_(0.3)
        return self.answers(problem, structure, run)


def unseeded(n, shape=()):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(torch.seed()))


@specimen("is_repeatable")
@dataclass(frozen=True)
class HasAGeneratorOfItsOwn(Oracle):
    def sample(self, n):
        z = 0.5 + 1.5 * torch.from_numpy(np.random.default_rng().standard_normal(n)).float()
        return {"z": z, "x": 2 * z - 1 + 0.75 * torch.randn(n)}

    answers = answering(sample=sample)


@specimen("minds_the_seed")
@dataclass(frozen=True)
class HasAFixedSeed(Oracle):
    def sample(self, n):
        torch.manual_seed(42)
        return OracleAnswers.sample(self, n)

    answers = answering(sample=sample)


@specimen("survives_saving", on=("learned-gaussian",))
@dataclass(frozen=True)
class SavesNothing(Oracle):
    answers = answering(tensors=lambda self: {}, load=lambda self, tensors: None)


@specimen("survives_saving")
@dataclass(frozen=True)
class CannotLoad(Oracle):
    def load(self, tensors):
        raise NotImplementedError

    answers = answering(load=load)


# --- shapes ---


@specimen("shapes_of_draws", on=("linear-gaussian",))
@dataclass(frozen=True)
class DrawsInColumns(Oracle):
    def posterior(self, problem, structure, n):
        return Draws(
            {k: v[..., None] for k, v in OracleAnswers.posterior(self, problem, structure, n).items()}
        )

    answers = answering(posterior=posterior)


@specimen("shapes_of_draws", on=("hmm",))
@dataclass(frozen=True)
class ForgetsASite(Oracle):
    def sample(self, n):
        drawn = OracleAnswers.sample(self, n)
        return {k: v for k, v in drawn.items() if k != "z1"}

    answers = answering(sample=sample)


@specimen("shapes_of_draws")
@dataclass(frozen=True)
class SqueezesOne(Oracle):
    def sample(self, n):
        return {k: v.squeeze() for k, v in OracleAnswers.sample(self, n).items()}

    answers = answering(sample=sample)


@specimen("shapes_of_log_prob")
@dataclass(frozen=True)
class SumsOverRows(Oracle):
    answers = answering(
        log_prob_of=lambda self, problem: OracleAnswers.log_prob_of(self, problem).sum()[None]
    )


@specimen("shapes_of_log_prob", on=("beta-bernoulli",))
@dataclass(frozen=True)
class CallsAMassADensity(Oracle):
    def log_prob(self, problem, structure):
        return replace(OracleAnswers.log_prob(self, problem, structure), measure="density")

    answers = answering(log_prob=log_prob)


@specimen("shapes_of_marginals")
@dataclass(frozen=True)
class MarginalOfOneRow(Oracle):
    def marginals(self, problem, structure):
        law = OracleAnswers.marginals(self, problem, structure)["z"]
        return {"z": dist.Normal(law.loc[:1], law.scale[:1])}

    answers = answering(marginals=marginals)


@specimen("answers_are_finite")
@dataclass(frozen=True)
class IsNotANumber(Oracle):
    def log_prob_of(self, problem):
        return OracleAnswers.log_prob_of(self, problem).index_fill(0, torch.tensor(0), math.nan)

    answers = answering(log_prob_of=log_prob_of)


@specimen("keeps_double_precision")
@dataclass(frozen=True)
class RoundsToSingle(Oracle):
    answers = answering(log_prob_of=lambda self, problem: OracleAnswers.log_prob_of(self, problem).float())


@specimen("rows_do_not_mix", "log_prob_is_true")
@dataclass(frozen=True)
class NormalisesByBatch(Oracle):
    def log_prob_of(self, problem):
        exact = OracleAnswers.log_prob_of(self, problem)
        return exact if problem.rows == 5 else exact + problem.observations["x"].mean()

    answers = answering(log_prob_of=log_prob_of)


# --- truth ---


@specimen("log_prob_is_true", on=("pushforward",))
@dataclass(frozen=True)
class ForgetsTheJacobian(Oracle):
    def log_prob_of(self, problem):
        x = problem.observations["x"]
        return dist.Normal(0.0, 1.0).log_prob((x.log() - 0.5) / 0.5)

    answers = answering(log_prob_of=log_prob_of)


@specimen("log_prob_is_true")
@dataclass(frozen=True)
class ClaimsThatAnElboIsExact(Oracle):
    def log_prob_of(self, problem):
        return OracleAnswers.log_prob_of(self, problem) - 0.05  # what a mediocre guide loses

    answers = answering(log_prob_of=log_prob_of)


@specimen("log_prob_is_true", "exact_log_prob_has_no_noise")
@dataclass(frozen=True)
class ClaimsThatAnEstimateIsExact(Oracle):
    def log_prob_of(self, problem):
        exact = OracleAnswers.log_prob_of(self, problem)
        return exact + 0.1 * torch.randn_like(exact)

    answers = answering(log_prob_of=log_prob_of)


@specimen("log_prob_is_true")
@dataclass(frozen=True)
class BoundOnTheWrongSide(Oracle):
    examine = offering(answers=promising(log_prob="lower bound"))

    def log_prob(self, problem, structure):
        return replace(
            OracleAnswers.log_prob(self, problem, structure),
            value=self.log_prob_of(problem) + 0.01,
            kind="lower bound",
        )

    answers = answering(log_prob=log_prob)


@specimen("log_prob_is_true")
@dataclass(frozen=True)
class EstimateWithoutError(Oracle):
    examine = offering(answers=promising(log_prob="estimate"))

    def log_prob(self, problem, structure):
        return replace(OracleAnswers.log_prob(self, problem, structure), kind="estimate")

    answers = answering(log_prob=log_prob)


@specimen("log_prob_is_true")
@dataclass(frozen=True)
class EstimateTooSure(Oracle):
    examine = offering(answers=promising(log_prob="estimate"))

    def log_prob(self, problem, structure):
        exact = OracleAnswers.log_prob(self, problem, structure)
        value = exact.value + 0.3 * torch.randn_like(exact.value)
        return replace(exact, value=value, kind="estimate", stderr=torch.full_like(value, 0.01))

    answers = answering(log_prob=log_prob)


@specimen("log_prob_is_true", on=("denoised",))
@dataclass(frozen=True)
class SolverTooSure(Oracle):
    """An equation solved without noise, further from the truth than it says."""

    missed: float = 0.02
    examine = offering(answers=promising(log_prob="estimate"))

    def log_prob(self, problem, structure):
        exact = OracleAnswers.log_prob(self, problem, structure)
        owned = torch.full_like(exact.value, 0.01)
        return replace(exact, value=exact.value + self.backend.missed, kind="estimate", solver_error=owned)

    answers = answering(log_prob=log_prob)


@specimen("log_prob_is_true", on=("denoised",))
@dataclass(frozen=True)
class ClaimsThatASolverIsExact(Oracle):
    def log_prob_of(self, problem):
        return OracleAnswers.log_prob_of(self, problem) + 0.02

    answers = answering(log_prob_of=log_prob_of)


@specimen("samples_are_true", on=("denoised",))
@dataclass(frozen=True)
class DenoisesTooMuch(Oracle):
    """Draws that end in the nearest denoised values lose variance."""

    def sample(self, n):
        x = OracleAnswers.sample(self, n)["x"]
        law = problems.denoised.exact()
        return {"x": law(x.double(), 0.3).float()}

    answers = answering(sample=sample)


@specimen("posterior_is_true", on=("denoised-latent",))
@dataclass(frozen=True)
class GuidesHalfAsMuch(Oracle):
    """Draws given an observation of twice the noise: what a likelihood of the denoised value alone does, roughly."""

    def joint_draws(self, data, n):
        return OracleAnswers.joint_draws(self, {"y": data["y"] / 2}, n)

    answers = answering(joint_draws=joint_draws)


@specimen("log_prob_is_true")
@dataclass(frozen=True)
class RemembersOnlyItsTrainingData(Oracle):
    def log_prob_of(self, problem):
        if problem.rows != 5:
            raise RuntimeError("unknown rows")
        return OracleAnswers.log_prob_of(self, problem)

    def log_prob(self, problem, structure):
        value = OracleAnswers.log_prob_of(self, problem)
        if problem.rows == 3:  # the first rows that it knows, in the wrong order
            value = value.flip(0)
        return Estimate(value, "estimate", torch.full_like(value, 1e-4))

    examine = offering(answers=promising(log_prob="estimate"))
    answers = answering(log_prob=log_prob)


@specimen("posterior_is_true")
@dataclass(frozen=True)
class BiasedByATenth(Oracle):
    def posterior(self, problem, structure, n):
        law = self.reference.posterior(data_of(problem))["z"]
        return {"z": (law.sample((n,)) + 0.1 * law.scale).float()}

    answers = answering(posterior=posterior)


@specimen("posterior_is_true")
@dataclass(frozen=True)
class TooSureByATenth(Oracle):
    def posterior(self, problem, structure, n):
        law = self.reference.posterior(data_of(problem))["z"]
        return {"z": (law.loc + 0.9 * law.scale * torch.randn(n, *law.loc.shape)).float()}

    answers = answering(posterior=posterior)


@specimen("posterior_is_true")
@dataclass(frozen=True)
class PosteriorIsThePrior(Oracle):
    examine = offering(answers=promising(posterior="estimate"))

    def posterior(self, problem, structure, n):
        return {"z": 0.5 + 1.5 * torch.randn(n, problem.rows)}

    answers = answering(posterior=posterior)


@specimen("posterior_is_true", on=("hmm",))
@dataclass(frozen=True)
class DrawsSitesApart(Oracle):
    def joint_draws(self, data, n):
        return {site: law.sample((n,)) for site, law in self.reference.posterior(data).items()}

    answers = answering(joint_draws=joint_draws)


@specimen("posterior_is_true", on=("gaussian-mean",))
@dataclass(frozen=True)
class AnswersAboutTheTrainingData(Oracle):
    def posterior(self, problem, structure, n):
        return OracleAnswers.posterior(self, self.problem, structure, n)

    answers = answering(posterior=posterior)


@specimen("marginals_are_true")
@dataclass(frozen=True)
class MarginalsTooWide(Oracle):
    def marginals(self, problem, structure):
        law = OracleAnswers.marginals(self, problem, structure)["z"]
        return {"z": dist.Normal(law.loc, 1.01 * law.scale)}

    answers = answering(marginals=marginals)


@specimen("samples_are_true")
@dataclass(frozen=True)
class SamplesFromTheData(Oracle):
    def sample(self, n):
        drawn = OracleAnswers.sample(self, n)
        return {**drawn, "x": self.problem.observations["x"][torch.randint(5, (n,))]}

    answers = answering(sample=sample)


@specimen("samples_are_true", on=("gaussian-mean",))
@dataclass(frozen=True)
class SharesOneLatentAmongAllDraws(Oracle):
    def sample(self, n):
        mu = 0.5 + 2.0 * torch.randn(())
        return {"mu": mu.expand(n), "x": mu + torch.randn(n)}

    answers = answering(sample=sample)


@specimen("learns", "samples_are_true", on=("learned-gaussian",))
@dataclass(frozen=True)
class LearnsNothing(Oracle):
    def fit(self, problem, structure, run):
        return self.answers(problem, structure, replace(run, steps=0))
