"""A far host that answers what nobody would: one sentence, in bounded time and memory.

A script takes the place of the ssh client: it greets as the far end does, and gives one answer to every question.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Callable, Iterator, List
from urllib.parse import quote

import pytest

from libvirt_cbt import errors
from libvirt_cbt.hypervisor import address, faraway, scratch, sentry, ssh
from libvirt_cbt.nbdio import still

ID = "0123456789abcdef"
HELLO = "ok 1 2f72756e 2f766172 qemu-img base64 timeout"  # /run and /var
PLACES = scratch.Places("/tmp/run/" + ID, "/run/" + ID, f"/var/cbt-{ID}", {"vda": f"/var/cbt-{ID}/vda.qcow2"})
NO_NUMBERS = ("", "x", "-1", "1_0", "9" * 5000, "\u0663")
END = """#!/bin/sh
[ "$1" = -F ] && exit 1
echo {ready}
while read -r verb rest; do
  case $verb in
    hello) echo "{hello}" ;;
    *) cat "$0.answer" ;;
  esac
done
"""


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`far(answer, hello=...)` is a site whose far end says that."""
    with contextlib.ExitStack() as stack:

        def made(answer: str, hello: str = HELLO) -> faraway.Ssh:
            script = tmp_path / "ssh"
            script.write_text(END.format(ready=ssh.READY, hello=hello))
            script.chmod(0o700)
            (tmp_path / "ssh.answer").write_bytes(answer.encode() + b"\n")
            found = faraway.Ssh(address.parse(f"qemu+ssh://far/system?command={quote(str(script))}"))
            stack.callback(found.close)
            return found

        yield made


@pytest.mark.parametrize("hello", ["", "ok", "ok 1", "ok 1 2f", "ok 2 2f72 2f76", "no", "ok 1 xx yy", "no text zz"])
def test_a_greeting_that_is_none(far: Any, hello: str) -> None:
    with pytest.raises(errors.NoHypervisor) as caught:
        far("", hello).socket_root()
    assert "\n" not in str(caught.value) and "far" in str(caught.value)


@pytest.mark.parametrize("answer", ["ok " + number for number in NO_NUMBERS] + ["no", "no space", "no space x", "yes 1", "\x1b[2J"], ids=range(11))
def test_a_number_that_is_none(far: Any, answer: str) -> None:
    with pytest.raises(errors.CbtError) as caught:
        far(answer).room("/var")
    assert str(caught.value).isprintable()


def test_numbers_that_are_some(far: Any) -> None:
    assert far("ok 123").room("/var") == 123
    with pytest.raises(FileNotFoundError):
        far("no space 5").room("/var")


@pytest.mark.parametrize("answer", ["ok", "ok 2f", "ok 2f 755", "ok 2f rwx yes", "ok xx 755 yes", "ok 2f 755 yes more"])
def test_a_folder_that_is_none(far: Any, answer: str) -> None:
    with pytest.raises(errors.HypervisorError, match="far: its answer is none"):
        far(answer).folder("/var")


def test_what_was_removed_is_text_or_nothing(far: Any) -> None:
    assert far("ok 2f61").remove(PLACES) == ["far:/a"]
    with pytest.raises(errors.HypervisorError, match="its answer is none"):
        far("ok /a").remove(PLACES)


def test_headers_and_files_are_no_longer_than_asked(far: Any) -> None:
    seen = far("ok 1:2 f " + "ab" * 5000).look(["/a"])["/a"]
    assert len(seen.header) <= 64
    with pytest.raises(errors.HypervisorError, match="its answer is none"):
        far("ok 1:2 f xyz").look(["/a"])
    assert far("ok 3 YWJj").read("/a", 100) == b"abc"
    for answer in ("ok 3 YWJj", "ok 4 YWJj", "ok x YWJj", "ok 3 Y", "ok"):
        with pytest.raises((errors.HypervisorError, ValueError)):
            far(answer).read("/a", 2)


def test_a_line_without_an_end(far: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "MOST_ANSWER", 1 << 20)
    site = far("")
    end = Path(site._address.parameters["command"])
    end.write_text(end.read_text().replace('cat "$0.answer"', "cat /dev/zero"))
    with pytest.raises(errors.HostLost, match="without an end"):
        site.asked("room", "/var", most=1 << 20)


@pytest.mark.parametrize(
    "info",
    [
        "", "null", "[]", "{", '{"virtual-size": "1"}', '{"virtual-size": -1}', '{"virtual-size": 1e30}', "[" * 10000,
        '{"virtual-size": 1, "format-specific": 5}',
        '{"virtual-size": 1, "format-specific": {"data": {"bitmaps": {}}}}',
        '{"virtual-size": 1, "format-specific": {"data": {"bitmaps": [{"name": 5, "flags": []}]}}}',
        '{"virtual-size": 1, "format-specific": {"data": {"bitmaps": [{"name": "b"}]}}}',
        '{"virtual-size": 1, "backing-filename": {}}',
    ],
    ids=range(13),
)  # fmt: skip
def test_an_image_that_is_described_by_no_qemu_img(info: str) -> None:
    class Lying(still.Here):
        def info(self, name: str, *, shared: bool = False) -> str:
            return info

    with pytest.raises(errors.ImageUnreadable, match="is no answer"):
        still.look(Lying(), "vda", os.devnull, "raw")
    with pytest.raises(ValueError):
        still.told(info)


def test_an_image_that_is_described_by_one() -> None:
    found = still.told('{"virtual-size": 9, "x": 1, "format-specific": {"type": "qcow2", "data": {"bitmaps": [{"name": "b", "flags": ["auto"], "granularity": 65536}]}}}')
    assert (found.capacity, still._bitmaps(found)) == (9, {"b": frozenset({"auto"})})
    assert still.told('{"virtual-size": 9}').specific.data.bitmaps == []


@pytest.mark.parametrize("words", [["full", "x"], ["free", "9" * 30], ["free", "-1"]])
def test_the_guards_post_gives_up_a_host_that_talks_nonsense(words: Any) -> None:
    one = object.__new__(sentry.Sentry)
    with pytest.raises(ssh.Lost):
        one._heard(words)
    one._heard(["full", "7"])
    assert (one.free, one.full) == (7, 7)


def test_clients_that_still_connect_end_with_their_site(tmp_path: Path) -> None:
    """libvirt could not be reached, and nobody waits for ours."""
    script = tmp_path / "ssh"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o700)
    far = faraway.Ssh(address.parse(f"qemu+ssh://far/system?command={quote(str(script))}"))
    before = set(children())
    far.begin(sentry=True)
    assert len(set(children()) - before) == 2
    far.close()
    assert set(children()) == before


def children() -> List[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
