"""What is shipped: every package, the templates, and an entry point."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import wheels

ROOT = wheels.ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheels.build(tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_every_module_and_template(wheel: zipfile.ZipFile) -> None:
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "libvirt_cbt").rglob("*.py")}
    wanted |= {f"libvirt_cbt/xml_templates/{path.name}" for path in (ROOT / "xml_templates").glob("*.xml")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "libvirt_cbt" / "hooks" / "files").iterdir()}
    wanted |= {"libvirt_cbt/py.typed", "libvirt_cbt/hypervisor/far.sh"}
    assert not wanted - set(wheel.namelist())


def test_the_wheel_holds_nothing_else_at_its_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/", 1)[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"libvirt_cbt"}


def test_templates_are_found_in_an_unpacked_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = (
        "import libvirt_cbt\nfrom importlib.resources import files\n"
        "print(*sorted(p.name for p in (files('libvirt_cbt') / 'xml_templates').iterdir()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {path.name for path in (ROOT / "xml_templates").glob("*.xml")} <= set(done.stdout.split())


def test_bindings_of_the_distribution_are_not_asked_of_pip() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {line.split(";")[0].split(">")[0].strip() for line in config["options"]["install_requires"].splitlines()}
    assert not names & {"nbd", "libnbd", "libvirt-python"}
    assert config["options.entry_points"]["console_scripts"].strip() == "libvirt-cbt = libvirt_cbt.cli:main"
