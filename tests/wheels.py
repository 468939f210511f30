"""The wheel of this checkout, and a virtual environment that it alone is installed in; without the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final, List

ROOT: Final = Path(__file__).resolve().parents[1]
OURS: Final = ("libvirt_cbt", "__editable__")  # what the tests' own environment has of this project
ENVIRONMENT: Final = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def build(folder: Path) -> Path:
    """Builds it from a copy: building leaves files behind."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, checkout)
    for name in ("libvirt_cbt", "xml_templates"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    _run([*pip, "--wheel-dir", str(folder), str(checkout)])
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """Makes an environment as pipx does with --system-site-packages, and gives the path of its command.

    pip would fetch the dependencies; here they are those of the tests' environment, without this project itself.
    """
    environment, dependencies = folder / "environment", folder / "dependencies"
    _run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(environment)])
    dependencies.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS) and entry.name != "__pycache__":
            (dependencies / entry.name).symlink_to(entry)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    _run([str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)])
    return environment / "bin" / "libvirt-cbt"


def _run(argv: List[str]) -> None:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
