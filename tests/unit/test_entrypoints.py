"""Hooks of other packages: found as entry points, called around the verbs, and never worse than a note."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Final, Iterator, List

import pytest

import libvirt_cbt
from libvirt_cbt import errors
from libvirt_cbt.hooks import entrypoints

ROOT: Final = Path(__file__).resolve().parents[2]
MODULE: Final = """
from libvirt_cbt import errors
calls = []

class Good:
    def pre(self, *args, **kwargs):
        calls.append(("pre", args[1:], kwargs))
    def post(self, rv, *args, **kwargs):
        calls.append(("post", rv, args[1:], kwargs))

class Last(Good):
    def pre(self, *args, **kwargs):
        calls.append("pre of the last")
    def post(self, rv, *args, **kwargs):
        calls.append("post of the last")

class Nothing:
    pass

class Fails:
    def pre(self, *args, **kwargs):
        raise RuntimeError("not\\x1b[31m today")
    def post(self, rv, *args, **kwargs):
        raise errors.HookStopped(script="fails", phase="post", reason="too late")

class Stops:
    def pre(self, *args, **kwargs):
        raise errors.HookStopped(script="stops", phase="backup", reason="not before six")

class Unmade:
    def __init__(self):
        raise RuntimeError("no")
"""


class Watch(libvirt_cbt.Watch):
    def __init__(self) -> None:
        self.notes: List[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Installs a package whose entry points are given; its module."""

    def install(points: str) -> Any:
        folder = tmp_path / "site"
        metadata = folder / "others-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(points)
        (folder / "others_hooks.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(folder))
        import others_hooks  # type: ignore[import-not-found]

        return others_hooks

    entrypoints.installed.cache_clear()
    yield install
    entrypoints.installed.cache_clear()
    sys.modules.pop("others_hooks", None)


def verb(session: libvirt_cbt.Session, domain: str, **kwargs: Any) -> Dict[str, Any]:
    """What a verb is."""
    return {"domain": domain, **kwargs}


def test_without_hooks_a_verb_is_itself() -> None:
    entrypoints.installed.cache_clear()
    assert entrypoints.around("backup", verb) is verb
    assert libvirt_cbt.backup.__module__ == "libvirt_cbt.actions.backup"


def test_pre_and_post_are_called_around_the_verb(package: Callable[[str], Any]) -> None:
    module = package(
        "[libvirt_cbt.hooks]\nbackup = others_hooks:Good\nmark = others_hooks:Stops\n"
        "[console_scripts]\nbackup = others_hooks:Fails\n"
    )
    called = entrypoints.around("backup", verb)
    assert (called.__name__, called.__doc__) == ("verb", verb.__doc__)
    with libvirt_cbt.Session(watch=Watch()) as session:
        assert called(session, "web1", full=True) == {"domain": "web1", "full": True}
    made = {"domain": "web1", "full": True}
    assert module.calls == [("pre", ("web1",), {"full": True}), ("post", made, ("web1",), {"full": True})]
    assert entrypoints.around("prune", verb) is verb


def test_several_are_left_in_the_other_order(package: Callable[[str], Any]) -> None:
    module = package("[libvirt_cbt.hooks]\nbackup = others_hooks:Good\n[other]\nx = y:z\n")
    metadata = Path(module.__file__).parent / "more-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[libvirt_cbt.hooks]\nbackup = others_hooks:Last\n")
    entrypoints.installed.cache_clear()
    entrypoints.around("backup", verb)(libvirt_cbt.Session(), "web1")
    kinds = [call if isinstance(call, str) else call[0] for call in module.calls]
    assert kinds == ["pre", "pre of the last", "post of the last", "post"]


def test_one_that_fails_is_noted_and_one_that_stops_stops(package: Callable[[str], Any]) -> None:
    package(
        "[libvirt_cbt.hooks]\nbackup = others_hooks:Fails\nmark = others_hooks:Stops\nstart = others_hooks:Nothing\n"
        "stop = others_hooks:Unmade\nprune = others_hooks:Missing\nrestore = no_such_module:X\n"
    )
    watch = Watch()
    session = libvirt_cbt.Session(watch=watch)
    for name in ("backup", "start", "stop", "prune", "restore"):
        assert entrypoints.around(name, verb)(session, "web1") == {"domain": "web1"}
    assert watch.notes[0] == "hook others_hooks:Fails: pre: RuntimeError: not\\x1b[31m today"
    assert "too late" in watch.notes[1]
    assert [("cannot be loaded" in note) for note in watch.notes[2:]] == [True, True, True]
    with pytest.raises(errors.HookStopped, match="stops stopped the run at backup: not before six"):
        entrypoints.around("mark", verb)(session, "web1")


def test_a_verb_that_fails_has_no_post(package: Callable[[str], Any]) -> None:
    module = package("[libvirt_cbt.hooks]\nbackup = others_hooks:Good\n")

    def fails(session: libvirt_cbt.Session, domain: str) -> None:
        raise errors.NoSuchDomain(domain=domain, uri="x")

    with pytest.raises(errors.NoSuchDomain):
        entrypoints.around("backup", fails)(libvirt_cbt.Session(), "web1")
    assert [call[0] for call in module.calls] == ["pre"]


def test_the_front_door_is_where_they_stand(package: Callable[[str], Any]) -> None:
    module = package("[libvirt_cbt.hooks]\ninit = others_hooks:Stops\n")
    with libvirt_cbt.Session() as session, pytest.raises(errors.HookStopped):
        libvirt_cbt.init(session)
    assert module.calls == []


def test_looking_for_them_is_cheap() -> None:
    """Nothing but the standard library's smallest is imported where no package has any."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from libvirt_cbt.hooks import entrypoints; "
        "assert entrypoints.installed() == (); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert not {"importlib.metadata", "email", "zipfile", "lxml", "numpy"} & set(done.stdout.split())


def test_the_example_of_the_document(package: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    from tests.libvirt.test_hook_examples import example

    points = [line.strip() for line in example("[options.entry_points]").splitlines() if line.startswith("    ")]
    module = package("\n".join(["[libvirt_cbt.hooks]", *points]))
    Path(module.__file__).with_name("shop_backups.py").write_text(example("class Announced"))

    class Made:
        domain, generation = "web1", 7

    with caplog.at_level("INFO"):
        assert entrypoints.around("backup", lambda *_args, **_kwargs: Made)(libvirt_cbt.Session(), "web1") is Made
    assert "web1: generation 7" in caplog.text
    with pytest.raises(errors.HookStopped, match="backed up elsewhere"):
        entrypoints.around("backup", verb)(libvirt_cbt.Session(), "payments")
    sys.modules.pop("shop_backups")
