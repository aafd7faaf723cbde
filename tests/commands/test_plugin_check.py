"""`pgen plugins check`: whatever a plugin does to its process, this one hears of it and goes on."""

from __future__ import annotations

import textwrap

import pytest

from pgen.commands.plugin_check import check_plugin
from pgen.errors import OptionError, UnknownName

HOOK = """
import pgen
@pgen.hookimpl
def pgen_programs():
    return {"mine": dict}
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(source, distribution="pgen-odd", name="odd"):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[pgen]\n{name} = {module}\n")

    return add


def test_a_good_plugin_is_ok(add):
    add("print('noise')" + HOOK)
    check = check_plugin("odd")
    assert check.ok, check
    assert check.provides == ("program mine",)
    assert str(check).startswith("plugin 'odd' of pgen-odd 1.5: ok in ")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os._exit(0)", "ended the process by itself, with exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
        ("1 / 0", "ZeroDivisionError"),
        (
            "import torch; torch.set_default_dtype(torch.float64); torch.manual_seed(1)" + HOOK,
            "changes torch's default dtype, torch's random state for everybody",
        ),
    ],
)
def test_a_bad_plugin_is_told(add, source, why):
    add(source)
    check = check_plugin("odd")
    assert not check.ok
    assert why in check.why
    assert "pgen-odd 1.5" in str(check)


def test_a_plugin_that_never_ends_is_ended(add):
    add("while True: pass")
    check = check_plugin("pgen-odd:odd", timeout=5)
    assert not check.ok
    assert "did not finish within 5 s" in check.why


def test_an_unrelated_broken_plugin_does_not_matter(add):
    add("import os; os._exit(1)", "pgen-broken", "broken")
    add(HOOK)
    assert check_plugin("odd").ok


def test_unknown_and_ambiguous_names_and_bad_limits(add):
    add(HOOK)
    add(HOOK, "pgen-other")
    with pytest.raises(UnknownName, match="'nobody'"):
        check_plugin("nobody")
    with pytest.raises(OptionError, match="'pgen-odd:odd' or 'pgen-other:odd'"):
        check_plugin("odd")
    with pytest.raises(OptionError, match="positive"):
        check_plugin("pgen-odd:odd", timeout=0)
