"""The shell at the far end, in every shell that may be its `sh`: a pipe stands for ssh."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from libvirt_cbt import machines
from libvirt_cbt.hypervisor import ssh

FAR = Path(ssh.__file__).with_name("far.sh")
ID = "0123456789abcdef"
SHELLS = {"dash": ["dash"], "bash": ["bash"], "bash-posix": ["bash", "--posix"], "busybox": ["busybox", "sh"]}


class End:
    """One far end; `ask` gives the words of the answer, with `ok` or `no` first."""

    def __init__(self, shell: List[str], home: Path, *, sent: bool = True, patience: int = 60) -> None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        self.process = subprocess.Popen(
            [*shell, "-s"] if sent else [*shell, str(FAR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        if sent:
            self.send(FAR.read_bytes().replace(b"_seconds=60", f"_seconds={patience}".encode()))
        assert self.line() == ssh.READY

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().rstrip("\n")

    def tell(self, *words: Any) -> None:
        self.send(" ".join(ssh._encoded(str(word)) for word in words).encode() + b"\n")

    def ask(self, *words: Any) -> List[str]:
        self.tell(*words)
        return self.line().split()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(params=SHELLS)
def shell(request: Any) -> List[str]:
    if not shutil.which(SHELLS[request.param][0]):
        pytest.skip(f"{SHELLS[request.param][0]} is not installed")
    return SHELLS[request.param]


@pytest.fixture
def end(shell: List[str], tmp_path: Path) -> Iterator[End]:
    made = End(shell, tmp_path)
    yield made
    made.close()


def texts(words: List[str]) -> List[str]:
    return [ssh.text(word) for word in words]


def test_it_says_who_it_is(end: End) -> None:
    word, version, run, scratch, *tools = end.ask("hello")
    assert (word, version) == ("ok", "1")
    assert texts([run, scratch]) == ["/run/libvirt-cbt", "/var/lib/libvirt/cbt-scratch"] or os.geteuid()
    assert "qemu-img" in tools


def test_places_are_made_and_removed(end: End, tmp_path: Path) -> None:
    run, directory = tmp_path / "a b" / ID, tmp_path / "$(x) \\ü'" / f"cbt-{ID}"
    files = {directory / "vda.qcow2": 1 << 20, directory / "vdb.qcow2": 3 << 20}
    words = [word for path, size in files.items() for word in (size, path)]
    assert end.ask("make", run, directory, "-", 1, *words)[0] == "ok"
    assert stat.S_IMODE(run.stat().st_mode) == stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.parent.stat().st_mode) == 0o711
    for path, size in files.items():
        assert path.read_bytes()[:4] == b"QFI\xfb"
        assert int.from_bytes(path.read_bytes()[24:32], "big") == size
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (directory / "foreign").write_text("stays")
    gone = texts(end.ask("remove", run, directory, *files)[1:])
    assert sorted(gone) == sorted(map(str, [*files, run]))
    assert [path.name for path in directory.iterdir()] == ["foreign"]


def test_what_is_there_is_not_made_again(end: End, tmp_path: Path) -> None:
    run, directory = tmp_path / ID, tmp_path / f"cbt-{ID}"
    directory.mkdir()
    assert end.ask("make", run, directory, "-", 1)[:2] == ["no", "denied"]


def test_places_that_others_could_exchange_are_refused(end: End, tmp_path: Path) -> None:
    for mode, answer in ((0o777, "no"), (0o1777, "ok"), (0o775, "ok")):
        parent = tmp_path / f"{mode:o}"
        parent.mkdir()
        parent.chmod(mode)
        for at in (parent, parent / "below"):
            assert end.ask("make", at / ID, at / f"cbt-{ID}", "-", 1)[0] == answer
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, -1)
        assert end.ask("make", tmp_path / "theirs" / ID, tmp_path / f"cbt-{ID}", "-", 1)[:2] == ["no", "denied"]


def test_without_room_nothing_is_begun(end: End, tmp_path: Path) -> None:
    word, kind, free = end.ask("make", tmp_path / ID, tmp_path / f"cbt-{ID}", "-", 1 << 62, 512, tmp_path / f"cbt-{ID}/a")
    assert (word, kind) == ("no", "space")
    assert 0 < int(free) < 1 << 62
    assert list((tmp_path / f"cbt-{ID}").iterdir()) == []


def test_only_places_with_an_id_are_touched(end: End, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    before = sorted(tmp_path.rglob("*"))
    ours = f"cbt-{ID}"
    for run, directory in (("etc", ours), (ID, "etc"), (ID, f"{ours}/.."), ("..", ours), (ID, "cbt-"), (ID, f"{ours}0")):
        for verb, *floor in (["make", "-", 1], ["remove"]):
            assert end.ask(verb, tmp_path / run, tmp_path / directory, *floor)[:2] == ["no", "denied"]
    assert sorted(tmp_path.rglob("*")) == before


def test_files_outside_are_neither_made_nor_removed(end: End, tmp_path: Path) -> None:
    run, directory, other = tmp_path / ID, tmp_path / f"cbt-{ID}", tmp_path / "other"
    assert end.ask("make", run, directory, "-", 1, 512, other)[:2] == ["no", "denied"]
    other.write_text("precious")
    (directory / "link").symlink_to(other)
    end.ask("remove", run, directory, other, directory / "../other", directory / "link")
    assert other.read_text() == "precious"


def test_files_are_looked_at_and_read(end: End, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "no\\such"
    one.write_bytes(bytes(range(256)))
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "lost").symlink_to(other)
    status = one.stat()
    known = [f"{status.st_dev}:{status.st_ino}", "f", bytes(range(32)).hex()]
    asked = end.ask("look", one, other, tmp_path / "link", tmp_path / "lost", tmp_path)
    assert asked[1:] == [*known, "-", "-", "-", *known, "-", "o", "-", asked[13], "o", "-"]
    word, size, content = end.ask("read", one, 256)
    assert (word, size, base64.b64decode(content)) == ("ok", "256", bytes(range(256)))
    for path, most in ((one, 255), (other, 255), (tmp_path, 4096)):
        assert end.ask("read", path, most)[:2] == ["no", "file"]


def test_room_and_folders(end: End, tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert abs(int(end.ask("room", tmp_path)[1]) - found.f_bavail * found.f_frsize) < 4 << 30
    assert end.ask("room", tmp_path / "no")[:2] == ["no", "gone"]
    tmp_path.chmod(0o700)
    assert end.ask("folder", tmp_path / "no" / "such") == ["ok", str(tmp_path).encode().hex(), "700", "yes"]


def test_images(end: End, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    assert end.ask("bitmap", "--add", path, "one")[0] == "ok"
    word, content = end.ask("info", "no", path)
    assert word == "ok" and b'"name": "one"' in base64.b64decode(content)
    word, kind, text = end.ask("bitmap", "--remove", path, "two")
    assert (word, kind) == ("no", "tool") and "two" in ssh.text(text)
    assert end.ask("bitmap", "--merge", path, "two")[:2] == ["no", "tool"]


def test_images_are_held(end: End, tmp_path: Path) -> None:
    path, run = tmp_path / "a.qcow2", tmp_path / ID
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    run.mkdir()
    server = ["--nbd-server", f"addr.type=unix,addr.path={run}/s", "--blockdev", f"driver=qcow2,node-name=n,file.driver=file,file.filename={path}"]  # fmt: skip
    export = ["--export", "type=nbd,id=e,node-name=n"]
    assert end.ask("hold", run / "s", *server, *export) == ["ok"]
    assert soon(lambda: machines.greets(str(run / "s"), 5))
    assert end.ask("alive") == ["ok"]
    write = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)]
    assert subprocess.run(write, capture_output=True, check=False).returncode
    assert end.ask("end") == ["ok"]
    assert not subprocess.run(write, capture_output=True, check=False).returncode
    # It says why it did not begin, and goes on to answer.
    assert end.ask("hold", run / "s", *server, "--export", "type=nbd,id=e,node-name=m") == ["ok"]
    said: List[List[str]] = [["ok"]]
    assert soon(lambda: said[-1][0] == "no" or said.append(end.ask("alive")))  # type: ignore[func-returns-value]
    assert "'m'" in ssh.text(said[-1][-1])
    assert end.ask("room", tmp_path)[0] == "ok"


def test_unknown_words_are_refused(end: End) -> None:
    for verb in ("rm", "main", "say", "do_hello", "$(touch /tmp/x)", "*"):
        assert end.ask(verb, "x")[:2] == ["no", "verb"]


def test_as_the_command_of_a_key(shell: List[str], tmp_path: Path) -> None:
    end = End(shell, tmp_path, sent=False)
    assert end.ask("hello")[0] == "ok"
    end.close()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SSH_ORIGINAL_COMMAND": "cat /etc/shadow"}
    done = subprocess.run([*shell, str(FAR)], env=environment, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, b"")
    helper = tmp_path / "virt-ssh-helper"
    helper.write_text('#!/bin/sh\necho "helped $*"\n')
    helper.chmod(0o755)
    environment["SSH_ORIGINAL_COMMAND"] = "sh -c 'which virt-ssh-helper; virt-ssh-helper '\\''qemu:///session'\\'''"
    done = subprocess.run([*shell, str(FAR)], env=environment, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout == b"helped qemu:///system\n"


# The guard.  A virsh that writes down what it is asked stands for the real one.


@pytest.fixture
def guarded(shell: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    tools = tmp_path / "bin"
    tools.mkdir()
    virsh = tools / "virsh"
    virsh.write_text(f"#!/bin/sh\necho \"$*\" >>{tmp_path}/asked\ncase $* in *dumpxml*) echo \"<server socket='/run/x'/>\" ;; esac\n")
    virsh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    end = End(shell, tmp_path)
    assert end.ask("guard", "uuid", "qemu:///system") == ["ok"]
    yield end
    end.close()


def soon(happens: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(0.02)
    return False


def asked(tmp_path: Path, sentence: str) -> bool:
    """Whether virsh is asked that, now or soon."""
    return soon(lambda: (tmp_path / "asked").exists() and sentence in (tmp_path / "asked").read_text())


def test_a_guest_that_stays_frozen_is_thawed(guarded: End, tmp_path: Path) -> None:
    guarded.tell("freeze", "0.1")
    assert asked(tmp_path, "domfsthaw uuid")


def test_a_guest_that_was_thawed_is_let_alone(guarded: End, tmp_path: Path) -> None:
    guarded.tell("freeze", "2")
    guarded.tell("thawed")
    guarded.tell("release")
    guarded.process.wait(30)
    time.sleep(2.2)
    assert not (tmp_path / "asked").exists()


def test_a_guest_is_thawed_when_the_connection_ends(guarded: End, tmp_path: Path) -> None:
    guarded.tell("freeze", "1000")
    guarded.close()
    assert asked(tmp_path, "domfsthaw uuid")


@pytest.mark.parametrize("socket", ["/run/x", "/run/other"])
def test_a_job_is_ended_when_room_runs_out(guarded: End, tmp_path: Path, socket: str) -> None:
    """Ours only: the job on another socket goes on."""
    guarded.tell("watch", socket, tmp_path, 1 << 62)
    assert guarded.line().split()[0] == "full"
    assert asked(tmp_path, "domjobabort uuid" if socket == "/run/x" else "backup-dumpxml uuid")
    guarded.tell("release")
    guarded.process.wait(30)
    assert ("domjobabort" in (tmp_path / "asked").read_text()) == (socket == "/run/x")


def test_room_is_told_of(guarded: End, tmp_path: Path) -> None:
    guarded.tell("watch", "/run/x", tmp_path, 1)
    word, free = guarded.line().split()
    assert word == "free" and int(free) > 1
    guarded.tell("release")
    guarded.process.wait(30)
    assert not (tmp_path / "asked").exists()


def test_a_job_is_not_ended_where_its_folder_went(guarded: End, tmp_path: Path) -> None:
    """The connection ended, but the job did, too: there is nothing to wait for."""
    directory = tmp_path / f"cbt-{ID}"
    directory.mkdir()
    guarded.tell("watch", "/run/x", directory, 1)
    guarded.line()
    shutil.rmtree(directory)
    guarded.close()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("how", ["ends", "is silent"])
def test_a_job_is_ended_when_nobody_comes_back(shell: List[str], guarded: End, tmp_path: Path, how: str) -> None:
    directory = tmp_path / f"cbt-{ID}"
    directory.mkdir()
    end = End(shell, tmp_path, patience=1)
    assert end.ask("guard", "uuid", "qemu:///system") == ["ok"]
    end.tell("watch", "/run/x", directory, 1)
    end.line()
    if how == "ends":
        end.close()
    assert asked(tmp_path, "domjobabort uuid")
    end.close()


def test_the_guard_of_a_new_connection_takes_over(shell: List[str], guarded: End, tmp_path: Path) -> None:
    directory = tmp_path / f"cbt-{ID}"
    directory.mkdir()
    guarded.tell("watch", "/run/x", directory, 1)
    guarded.line()
    second = End(shell, tmp_path)
    assert second.ask("guard", "uuid", "qemu:///system") == ["ok"]
    second.tell("watch", "/run/x", directory, 1)
    second.line()
    guarded.close()  # ends at once, and not in a minute
    assert not (tmp_path / "asked").exists()
    second.tell("release")
    second.close()
