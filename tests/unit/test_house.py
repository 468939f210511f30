"""The house of docs/architecture: imports go down only, and only one room each knows libvirt and libnbd."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Dict, Final, FrozenSet, Iterator, List, Set, Tuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = "libvirt_cbt"
MIDDLE: Final = frozenset({"hypervisor", "nbdio", "repository"})
# What each room may import besides itself; "" is the modules of the package's root.
BELOW: Final[Dict[str, FrozenSet[str]]] = {
    "": frozenset(),
    **{room: frozenset({""}) for room in MIDDLE},
    "actions": MIDDLE | {""},
    "cli": MIDDLE | {"actions", "hooks", ""},
    "hooks": MIDDLE | {"actions", ""},
    "__init__": frozenset({"actions", "hooks", ""}),
}
# The package's own __init__ is its front door: verbs for other programs.  Nobody inside goes through it.
FRONT_DOOR: Final = "__init__"
# The only room that may import each of these.
OWNERS: Final = {"libvirt": "hypervisor", "libvirt_qemu": "hypervisor", "libvirtmod": "hypervisor", "nbd": "nbdio"}


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[Tuple[int, str]]:
    """(line, absolute name) of everything a file imports: inside functions, under TYPE_CHECKING and by importlib, too.

    Of ``from a import b`` both a and a.b are named, as b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room_of(name: str) -> str:
    """The room that an absolute name of ours lies in."""
    parts = name.split(".")
    if len(parts) < 2 or (ROOT / PACKAGE / f"{parts[1]}.py").exists() or parts[1].startswith("__"):
        return ""
    return parts[1] if parts[1] in BELOW else FRONT_DOOR


def offences(source: str, path: str) -> List[str]:
    """What the file `path` (from the checkout's root) may not import, as sentences."""
    file = Path(path)
    is_package = file.name == "__init__.py"
    module = ".".join(file.parent.parts if is_package else file.with_suffix("").parts)
    room = FRONT_DOOR if module == PACKAGE else room_of(module) if len(file.parts) > 2 else ""
    found: Set[str] = set()
    for line, name in imported(ast.parse(source), module, is_package=is_package):
        top = name.split(".", 1)[0]
        if top in OWNERS and OWNERS[top] != room:
            found.add(f"{path}:{line}: only {OWNERS[top]} imports {top}")
        if top == PACKAGE and room_of(name) not in BELOW[room] | {room}:
            found.add(f"{path}:{line}: {room or 'the root'} imports {name}")
    return sorted(found)


def sources() -> List[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", sources())
def test_imports_go_down_only(path: str) -> None:
    assert offences((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", sources())
def test_every_file_stands_in_a_room(path: str) -> None:
    parts = Path(path).parts
    assert len(parts) == 2 or parts[1] in BELOW, f"{parts[1]} is no room of the house"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("libvirt_cbt/errors.py", "from libvirt_cbt import actions"),
        ("libvirt_cbt/errors.py", "def f():\n    import libvirt_cbt.nbdio.copy"),
        ("libvirt_cbt/__init__.py", "from .repository import store"),
        ("libvirt_cbt/nbdio/copy.py", "from libvirt_cbt import backup"),
        ("libvirt_cbt/nbdio/copy.py", "from libvirt_cbt.repository import store"),
        ("libvirt_cbt/nbdio/copy.py", "from .. import hypervisor"),
        ("libvirt_cbt/nbdio/__init__.py", "from ..hypervisor import job"),
        ("libvirt_cbt/repository/store.py", "from libvirt_cbt.actions.backup import backup"),
        ("libvirt_cbt/hypervisor/job.py", "if TYPE_CHECKING:\n    from libvirt_cbt.cli import main"),
        ("libvirt_cbt/actions/backup.py", "import importlib\nimportlib.import_module('libvirt_cbt.cli.main')"),
        ("libvirt_cbt/actions/backup.py", "import libvirt"),
        ("libvirt_cbt/nbdio/copy.py", "def f():\n    from libvirt_qemu import qemuMonitorCommand"),
        ("libvirt_cbt/cli/backup.py", "import nbd"),
        ("libvirt_cbt/actions/recover.py", "from libvirt_cbt.hooks import installing"),
        ("libvirt_cbt/hooks/qemu.py", "from ..cli import main"),
    ],
)
def test_an_import_up_or_across_is_found(path: str, source: str) -> None:
    assert offences(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("libvirt_cbt/nbdio/copy.py", "import nbd\nfrom libvirt_cbt import errors, extents\nfrom . import client"),
        ("libvirt_cbt/__init__.py", "from libvirt_cbt.actions.backup import backup"),
        ("libvirt_cbt/hypervisor/job.py", "import libvirt\nfrom ..errors import CbtError"),
        (
            "libvirt_cbt/actions/backup.py",
            "from libvirt_cbt.nbdio import copy\nfrom libvirt_cbt.repository import store",
        ),
        (
            "libvirt_cbt/cli/backup.py",
            "from libvirt_cbt import actions, errors\nfrom libvirt_cbt.actions import backup",
        ),
    ],
)
def test_an_import_down_is_not(path: str, source: str) -> None:
    assert offences(source, path) == []


def test_the_package_was_found() -> None:
    assert os.path.join(PACKAGE, "errors.py") in sources()
