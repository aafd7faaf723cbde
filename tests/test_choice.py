"""Choosing: what is needed, what leads there, who offers what, and which site lacks what."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pgen.capability import Capability, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import Explanation, Row, choose, examine, learned_factor, names_of, refusal_text, require
from pgen.errors import OptionError, Refused, UnknownName
from pgen.inspection import structure_of
from pgen.testing.unsuitable import Opaque

C = Capability


def program(n):
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(z + k, 1.0))


def implicit(n):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", Opaque(z.expand(n)))


STRUCTURE = structure_of(program, {"x": torch.randn(4)})


def test_what_is_there_needs_no_path():
    assert require(STRUCTURE, latent=[C.SAMPLE], observed=[C.LOG_PROB]) == {}


def test_what_is_missing_is_led_to():
    paths = require(STRUCTURE, observed=[C.SCORE])
    assert names_of(paths) == {"x": ("density", "autograd-score")}


def test_several_needs_share_a_path():
    paths = require(STRUCTURE, observed=[C.LOG_DENSITY, C.SCORE])
    assert names_of(paths) == {"x": ("density", "autograd-score")}


def test_the_first_site_that_cannot_is_named():
    refusal = require(
        structure_of(implicit, {"x": torch.zeros(4)}), latent=[C.RSAMPLE], observed=[C.LOG_PROB]
    )
    assert refusal == Refusal("x", "log_prob", refusal.why)
    assert refusal.why == (
        "observed site 'x' (Opaque) can rsample, sample; no installed conversion leads from there to log_prob"
    )
    refusal = require(STRUCTURE, latent=[C.RSAMPLE])
    assert (refusal.site, refusal.missing) == ("k", "rsample")
    assert refusal.why.startswith("latent site 'k' (Categorical) can enumerate, log_prob, sample")


def test_factors_are_asked_nothing():
    def with_factor(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("f", -x)

    assert require(structure_of(with_factor, {"x": torch.zeros(3)}), observed=[C.SAMPLE]) == {}


def test_via_is_checked():
    with pytest.raises(
        OptionError, match=r"via names the site 'y', which program does not have; its sites: k, z, x"
    ):
        require(STRUCTURE, via={"y": "density"})
    with pytest.raises(UnknownName, match="no conversion 'densty'"):
        require(STRUCTURE, observed=[C.LOG_DENSITY], via={"x": "densty"})


def test_via_forces_a_detour():
    paths = require(STRUCTURE, latent=[C.SAMPLE], via={"k": "table"})
    assert names_of(paths) == {"k": ("table",)}


# --- a learned energy under factor ---

NETWORK = nn.Linear(1, 1)


def energy(n):
    with pyro.plate("data", n):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("energy", NETWORK(x[:, None])[:, 0])


def energy_and_law(n):
    with pyro.plate("data", n):
        x = pyro.sample("x", dist.Normal(NETWORK.bias, 1.0))
        pyro.factor("energy", NETWORK.bias * x)


def fixed_energy(n):
    with pyro.plate("data", n):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("energy", NETWORK.weight.detach()[0, 0] * x)


def test_a_learned_factor_is_refused_with_the_fix():
    refusal = learned_factor(structure_of(energy, {"x": torch.zeros(3)}))
    assert refusal.site == "energy"
    assert refusal.missing == "log-normaliser gradient"
    for part in (
        "'energy' depends on the learned NETWORK.bias, NETWORK.weight",
        "log Z",
        "as the law of a site",
        "requires_grad_(False)",
    ):
        assert part in refusal.why


def test_fixed_evidence_is_fine():
    assert learned_factor(structure_of(program, {"x": torch.zeros(3)})) is None
    assert learned_factor(structure_of(energy_and_law, {"x": torch.zeros(3)})) is None
    NETWORK.requires_grad_(False)
    try:
        assert learned_factor(structure_of(energy, {"x": torch.zeros(3)})) is None
    finally:
        NETWORK.requires_grad_(True)


# --- choosing ---


@dataclass(frozen=True)
class Says:
    """A backend that answers as told."""

    name: ClassVar[str] = "says"
    answer: object = None
    called: str = field(default="says")

    def examine(self, structure):
        return self.answer

    def fit(self, problem, structure, run): ...


def says(name, rank=None, why="because", **answers):
    given = {Query(k): Exactness(v) for k, v in answers.items()}
    answer = Refusal("z", "charm", why) if rank is None else Offer(given, rank, why)
    return type(name, (Says,), {"name": name})(answer)


def test_the_best_rank_wins_then_the_more_exact_answers():
    good, better = (
        says("good", Rank.SUITED, log_prob="exact"),
        says("better", Rank.IDEAL, log_prob="estimate"),
    )
    assert choose(STRUCTURE, [good, better]) is better
    more = says("more", Rank.SUITED, log_prob="exact", sample="exact")
    assert choose(STRUCTURE, [good, more]) is more
    assert choose(STRUCTURE, [says("no"), good]) is good


def test_a_tie_is_for_the_user_to_break():
    with pytest.raises(
        OptionError, match=r"'a' and 'b' serve program equally well; name one: pgen.fit\(program, data, 'a'\)"
    ):
        choose(STRUCTURE, [says("b", Rank.SUITED, sample="exact"), says("a", Rank.SUITED, sample="exact")])


def test_when_nobody_can_everybody_says_why():
    with pytest.raises(Refused) as caught:
        choose(STRUCTURE, [says("one", why="it is discrete"), says("two", why="it is too big")])
    text = str(caught.value)
    assert "no installed backend can serve program" in text
    assert "one: site 'z' lacks charm: it is discrete" in text
    assert "two: site 'z' lacks charm: it is too big" in text
    with pytest.raises(Refused, match="none is installed"):
        choose(STRUCTURE, [])


def test_an_explanation_is_rows_and_a_table():
    explanation = examine(
        STRUCTURE, [says("no", why="too big"), says("yes", Rank.SUITED, why="it can", log_prob="lower bound")]
    )
    assert [row.backend for row in explanation] == ["yes", "no"]
    assert [row.offered for row in explanation] == [True, False]
    assert len(explanation) == 2
    assert explanation["no"].answer.missing == "charm"
    text = str(explanation)
    for part in (
        "Structure of program",
        "observed x | k, z",
        "yes",
        "suited",
        "lower bound",
        "it can",
        "missing charm",
        "too big",
    ):
        assert part in text
    assert repr(explanation) == text


def test_refusals_read_as_a_sentence():
    assert (
        refusal_text(Refusal("z", "log_prob", "it is implicit")) == "site 'z' lacks log_prob: it is implicit"
    )
    assert refusal_text(Refusal(None, "a data plate", "it has none")) == "missing a data plate: it has none"


def test_brackets_in_a_reason_are_text_and_not_markup():
    """Rich would take `[values, 1]` for a style, and leave it out."""
    refusal = Refusal("z", "room", "tensors of shape [values, 1]")
    told = str(Explanation(structure_of(lambda: None), (Row("b", refusal),)))
    assert "[values, 1]" in told
