"""`pgen plugins new`: what it writes is the template, installs, and passes conformance as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pgen.commands.scaffold import write_plugin
from pgen.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "plugins" / "pgen-template"


def texts(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_the_template_is_what_the_scaffold_writes(tmp_path):
    written = texts(write_plugin("template", tmp_path / "pgen-template"))
    assert written.keys() == {
        "pyproject.toml",
        "README.md",
        "pgen_template.py",
        "test_conformance.py",
        ".gitignore",
    }
    assert written == {name: (TEMPLATE / name).read_text() for name in written}


def test_the_name_is_changed_throughout(tmp_path):
    folder = write_plugin("nested-sampling", tmp_path / "anywhere")
    written = texts(folder)
    assert "pgen_nested_sampling.py" in written
    everything = "\n".join(written.values())
    assert "emplate" not in everything
    assert "$" not in everything.replace("$ ", "")
    assert 'nested-sampling = "pgen_nested_sampling"' in written["pyproject.toml"]
    assert "class NestedSamplingBackend:" in written["pgen_nested_sampling.py"]


@pytest.mark.parametrize("name", ["none", "class", "a", "x2", "import", "torch"])
def test_odd_names_still_make_valid_python(tmp_path, name):
    folder = write_plugin(name, tmp_path / "it")
    for path in folder.glob("*.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.parametrize(
    "name", ["", "Has-Capitals", "under_score", "2fast", "-x", "x-", "a--b", "../up", "a b", "é"]
)
def test_names_that_cannot_be_are_refused(tmp_path, name):
    with pytest.raises(OptionError, match="lower-case words"):
        write_plugin(name, tmp_path / "it")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("name", ["exact", "variational", "zoo", "ppl"])
def test_names_of_builtins_are_refused(tmp_path, name):
    with pytest.raises(OptionError, match="built-in"):
        write_plugin(name, tmp_path / "it")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OptionError, match="not an empty folder"):
        write_plugin("good", tmp_path)
    with pytest.raises(OptionError, match="not an empty folder"):
        write_plugin("good", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert write_plugin("good", tmp_path / "empty") == tmp_path / "empty"


def test_the_default_folder_is_named_after_the_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_plugin("good").resolve() == tmp_path / "pgen-good"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A new plugin, installed into a folder of its own: its source, and the environment that sees it."""
    folder = tmp_path_factory.mktemp("fresh")
    source, site = write_plugin("fresh-start", folder / "source"), folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=120)
    path = os.pathsep.join([str(site), str(ROOT)])
    return source, {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PGEN_STRICT_PLUGINS": "1"}


def run(command, fresh):
    source, environment = fresh
    return subprocess.run(
        [sys.executable, *command],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_a_new_plugin_is_active_once_installed(fresh):
    code = (
        "import pgen\n"
        "plugin = next(p for p in pgen.Registry.installed().plugins if p.name == 'fresh-start')\n"
        "print(plugin.distribution, plugin.origin, plugin.state, *plugin.hooks)"
    )
    done = run(["-c", code], fresh)
    assert done.stdout == "pgen-fresh-start installed active pgen_backends\n", done.stdout + done.stderr


def test_a_new_plugin_passes_conformance_at_once(fresh):
    done = run(["-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"], fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 100, done.stdout
