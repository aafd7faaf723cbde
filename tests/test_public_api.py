"""The names and signatures that users call are a contract; each is documented; errors are one family."""

import inspect

import pytest

import pgen

NAMES = {
    "Answers",
    "Backend",
    "Capability",
    "Conversion",
    "Draws",
    "Estimate",
    "Exactness",
    "Fitted",
    "Offer",
    "Problem",
    "Query",
    "Rank",
    "Refusal",
    "Registry",
    "Run",
    "Site",
    "Structure",
    "backend",
    "compare",
    "distributions",
    "errors",
    "explain",
    "fit",
    "hookimpl",
    "hookspec",
    "learned_factor",
    "load",
    "names_of",
    "require",
    "structure_of",
    "testing",
}

#: name -> parameters in order; those after "*" by keyword only
SIGNATURES = {
    "fit": ["program", "data", "backend", "*", "args", "kwargs", "run", "seed"],
    "explain": ["program", "data"],
    "structure_of": ["program", "data"],
    "compare": ["program", "data", "backends", "*", "test", "run", "seed"],
    "load": ["path", "program"],
    "backend": ["name"],
    "Fitted.sample": ["self", "n", "*", "seed"],
    "Fitted.log_prob": ["self", "data"],
    "Fitted.posterior": ["self", "data", "n", "*", "seed"],
    "Fitted.marginals": ["self", "data"],
    "Fitted.save": ["self", "path"],
}


def find(path):
    thing = pgen
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def test_the_names_are_these():
    assert set(pgen.__all__) >= NAMES
    assert set(pgen.__all__) <= set(dir(pgen))
    for name in pgen.__all__:
        assert getattr(pgen, name) is not None


@pytest.mark.parametrize("path", SIGNATURES)
def test_the_signatures_are_these(path):
    parameters = list(inspect.signature(find(path)).parameters.values())
    names, keyword_only = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            names.append("*")
            keyword_only = True
        names.append(p.name)
    expected = SIGNATURES[path]
    positional = expected[: expected.index("*")] if "*" in expected else expected
    assert names[: len(positional)] == positional
    for name in expected[len(positional) + 1 :]:
        assert name in names[names.index("*") :]


def test_defaults_of_the_contract():
    assert inspect.signature(pgen.fit).parameters["args"].default == ()
    assert inspect.signature(pgen.Fitted.posterior).parameters["n"].default == 1000
    options = "steps batch_size optimizer lr device precision devices nodes strategy compile"
    for name in (*options.split(), "checkpoint_every", "directory", "progress"):
        assert name in inspect.signature(pgen.Run).parameters


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_documented(name):
    thing = getattr(pgen, name)
    if name in ("hookimpl", "hookspec"):
        return
    text = inspect.getdoc(thing)
    assert text
    assert text.strip()


def test_every_error_is_of_the_family_and_documented():
    errors = [e for e in vars(pgen.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) >= 10
    for error in errors:
        assert issubclass(error, pgen.errors.PgenError)
        assert error.__doc__
        assert error.__module__ == "pgen.errors"


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match=r"module 'pgen' has no attribute 'ft'; it has .*fit"):
        pgen.ft


def test_kinds_compare_as_words():
    assert pgen.Exactness.LOWER_BOUND == "lower bound"
    assert pgen.Query.LOG_PROB == "log_prob"
    assert {e.value for e in pgen.Exactness} >= {
        "exact",
        "lower bound",
        "upper bound",
        "estimate",
        "unnormalized",
    }


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("pgen-ppl") == pgen.__version__
