"""The packages in `plugins/`: each stands on its own. Their own tests run beside these."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pgen.commands.plugin_check import check_plugin
from pgen.plugins.loader import scan
from pgen.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(p.parent for p in (ROOT / "plugins").glob("*/pyproject.toml"))


@pytest.fixture(params=PACKAGES, ids=lambda folder: folder.name)
def project(request):
    return tomllib.loads((request.param / "pyproject.toml").read_text())["project"], request.param


def test_there_are_plugins_and_the_template_is_one():
    assert "pgen-template" in [folder.name for folder in PACKAGES]


def test_a_plugin_declares_itself(project):
    declared, folder = project
    assert declared["name"] == folder.name
    assert declared["entry-points"]["pgen"]
    asked = {r.name: r for r in map(Requirement, declared["dependencies"])}
    host = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert asked["pgen-ppl"].specifier.contains(host["version"])
    assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")
    assert list(folder.glob("test_*.py"))


def test_a_plugin_is_installed_and_active(project):
    declared, _ = project
    rows = [p for p in Registry.installed().plugins if p.distribution == declared["name"]]
    assert rows, (
        f"{declared['name']} is not installed: make install, or pip install -e plugins/{declared['name']}"
    )
    assert {p.state for p in rows} == {"active"}, [p.why for p in rows]


def test_a_plugin_survives_a_check_in_a_process_of_its_own(project):
    declared, _ = project
    for plugin in (p for p in scan() if p.distribution == declared["name"]):
        check = check_plugin(plugin.qualified)
        assert check.ok, check
        assert check.provides
