"""Servers end exactly once, with the reason they gave when it was not us."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Set
from urllib.parse import quote

import pytest

from libvirt_cbt import errors
from libvirt_cbt.nbdio import qcow2, server
from tests.nbd.conftest import MIB, assert_same, run


def children() -> List[int]:
    """Process ids of our own children."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def layer(folder: str, name: str = "vda.qcow2") -> str:
    path = os.path.join(folder, name)
    qcow2.create_layer(path, MIB + 512, backing=None, compress=True)
    return path


def test_a_server_ends_with_its_context(folder: str) -> None:
    path, before = layer(folder), children()
    with server.sink(path, folder, compress=True) as endpoints:
        assert len(children()) == len(before) + 1
        assert os.path.exists(endpoints[0].socket)
    assert children() == before
    assert not os.path.exists(endpoints[0].socket)


def test_a_server_ends_when_its_context_fails(folder: str) -> None:
    path, before = layer(folder), children()
    with pytest.raises(ZeroDivisionError):
        with server.layers([path], folder):
            raise ZeroDivisionError
    assert children() == before


def test_a_server_that_dies_is_reported(folder: str) -> None:
    path, before = layer(folder), children()
    served = server.sink(path, folder, compress=True)
    served.__enter__()
    [pid] = set(children()) - set(before)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(errors.ToolFailed, match="qemu-storage-daemon"):
        served.__exit__(None, None, None)


def test_a_server_that_cannot_start_says_why(folder: str) -> None:
    good, bad = layer(folder), layer(folder, "vdb.qcow2")
    with open(bad, "r+b") as file:  # the header's cluster size
        file.seek(20)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(errors.Damaged, match=r"vdb.*[Cc]luster size"):
        with server.layers([good, bad], folder):
            pass


def test_an_export_of_many_layers_is_there_when_the_context_begins(folder: str) -> None:
    """The socket listens before the last image is open."""
    paths = [layer(folder, f"vd{n}.qcow2") for n in range(30)]
    for _ in range(5):
        with server.layers(paths, folder) as endpoints:
            assert len(endpoints) == 30
            run("nbdinfo", "--size", uri(endpoints[-1]))


def test_a_daemon_that_is_read_from_has_no_more_threads_than_processors(folder: str) -> None:
    """Many would read a file out of order, and the kernel would read nothing ahead."""
    path, before = os.path.join(folder, "vda.qcow2"), set(children())
    qcow2.create_layer(path, 16 * MIB, backing=None, compress=True)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 16M", path)
    with server.layers([path], folder) as [endpoint]:
        run("nbdcopy", "--requests=64", uri(endpoint), "null:")
        assert_threads(before, max(1, len(os.sched_getaffinity(0)) - 1))


def test_a_daemon_that_compresses_has_no_more_threads_than_processors(folder: str) -> None:
    """More would only take turns, and the client and the daemon's main loop with them."""
    path, before = os.path.join(folder, "vda.qcow2"), set(children())
    qcow2.create_layer(path, 16 * MIB, backing=None, compress=True)
    with server.sink(path, folder, compress=True) as [compressing, _]:
        run("nbdcopy", "--requests=64", "--", "[", "nbdkit", "--exit-with-parent", "pattern", "16M", "]", uri(compressing))
        assert_threads(before, len(os.sched_getaffinity(0)))


def uri(endpoint: server.Endpoint) -> str:
    return f"nbd+unix:///{endpoint.export}?socket={quote(endpoint.socket)}"


def assert_threads(before: Set[int], most: int) -> None:
    """Of the one child that is new; those of its pool that are idle stay for ten seconds."""
    if not server.threads(most):
        pytest.skip("this QEMU cannot be told")
    [pid] = set(children()) - before
    assert len(os.listdir(f"/proc/{pid}/task")) <= 2 + most  # the main loop and RCU are QEMU's own


def shows(endpoint: server.Endpoint, folder: str) -> bytes:
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(endpoint), f"{folder}/shown.raw")
    return Path(f"{folder}/shown.raw").read_bytes()


def test_a_chain_of_sixty_layers_of_a_growing_disk(folder: str, rng: random.Random) -> None:
    """Names in the headers are wrong on purpose: the chain is what the caller says."""
    model = bytearray()
    paths: List[str] = []
    for number in range(60):
        grown = rng.choice((0, 0, 512, 65536, 100 * 512)) if number else MIB
        model += bytes(grown)
        path = os.path.join(folder, f"layer-{number}.qcow2")
        qcow2.create_layer(
            path, len(model), backing=f"{number}.gone.qcow2" if number % 2 else "layer-0.qcow2", compress=True
        )
        offset = rng.randrange(len(model) // 65536) * 65536
        byte = number % 4 and number + 1  # every fourth writes zeroes, which must hide what is below
        length = min(3 * 65536, qcow2.rounded(len(model)) - offset)
        command = f"write -P {byte} {offset} {length}" if byte else f"write -z {offset} {length}"
        run("qemu-io", "-c", command, server.alone(path))
        qcow2.finish_layer(path, len(model))
        model[offset : offset + length] = bytes([byte]) * min(length, len(model) - offset)
        paths.insert(0, path)
    before = children()
    with server.chain(paths, folder) as endpoint:
        assert len(children()) == len(before) + 1
        assert_same(shows(endpoint, folder), model, "the chain")
        run("nbdinfo", "--is", "read-only", uri(endpoint))
    assert children() == before
    with server.chain(paths[30:], folder) as endpoint:
        assert len(shows(endpoint, folder)) <= len(model)


def test_a_chain_ends_where_the_caller_says(folder: str) -> None:
    """The oldest layer's own backing file, which a hostile repository could name, shows nothing."""
    secret = os.path.join(folder, "secret.qcow2")
    qcow2.create_layer(secret, MIB, backing=None, compress=True)
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 115 0 {MIB}", secret)
    path = os.path.join(folder, "vda.qcow2")
    qcow2.create_layer(path, MIB, backing="secret.qcow2", compress=True)
    with server.chain([path], folder) as endpoint:
        assert_same(shows(endpoint, folder), bytes(MIB), "the chain")
    with server.chain([path, secret], folder) as endpoint:
        assert_same(shows(endpoint, folder), b"s" * MIB, "the chain")


def test_chains_of_two_disks_at_once(folder: str) -> None:
    with server.chain([layer(folder)], folder) as one, server.chain([layer(folder, "vdb.qcow2")], folder) as two:
        assert one != two
        assert shows(one, folder) == shows(two, folder)


def test_a_chain_with_a_layer_missing(folder: str) -> None:
    with pytest.raises(errors.Damaged, match="No such file"):
        with server.chain([layer(folder), f"{folder}/gone.qcow2"], folder):
            pass


def test_a_missing_layer(folder: str) -> None:
    with pytest.raises(errors.Damaged, match="No such file"):
        with server.layers([f"{folder}/gone.qcow2"], folder):
            pass


def test_a_layer_that_points_elsewhere_is_refused(folder: str) -> None:
    """A repository may be hostile: an external data file would hand out any file of the host."""
    secret = os.path.join(folder, "secret")
    Path(secret).write_bytes(b"s" * MIB)
    path = os.path.join(folder, "vda.qcow2")
    options = f"data_file={secret}.copy,data_file_raw=on"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(MIB))
    chained = server.chain([layer(folder, "vdb.qcow2"), path], folder)
    for opened in (server.layers([path], folder), server.sink(path, folder, compress=False), chained):
        with pytest.raises(errors.Damaged, match="external data file"):
            with opened:
                pass


def test_a_backing_file_is_not_opened(folder: str) -> None:
    parent, path = layer(folder, "parent.qcow2"), os.path.join(folder, "vda.qcow2")
    qcow2.create_layer(path, MIB + 512, backing="parent.qcow2", compress=True)
    os.unlink(parent)
    with server.layers([path], folder), server.sink(layer(folder, "vdb.qcow2"), folder, compress=True):
        pass


def test_a_socket_path_that_is_too_long(folder: str) -> None:
    deep = os.path.join(folder, "d" * 100)
    os.mkdir(deep)
    with pytest.raises(errors.HypervisorError, match="too long"):
        with server.sink(layer(folder), deep, compress=True):
            pass


def test_odd_names(folder: str) -> None:
    """A comma ends an option of QEMU's, a colon makes a protocol, a quote ends JSON."""
    odd = os.path.join(folder, "a,b=c:d\"e 'f")
    os.mkdir(odd)
    path = layer(odd, "sda:1,x.qcow2")
    with server.layers([path], odd):
        pass
    with server.chain([path, layer(odd, "sdb:1,x.qcow2")], odd):
        pass
    with open(layer(odd, "i,m.qcow2"), "r+b") as image:
        with server.sink(path, odd, compress=True), server.image(image.fileno(), odd):
            pass


TOOL = """
import sys, time
from libvirt_cbt.nbdio import server

def started(process, *_):
    print(process.pid, flush=True)
    time.sleep(60)

server._wait_started = started
with server.sink(sys.argv[1], sys.argv[2], compress=True):
    pass
"""


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.3])
def test_a_killed_tool_leaves_no_server(folder: str, delay: float) -> None:
    """SIGKILL runs no `finally`: the kernel ends the server, however far it had come."""
    tool = subprocess.Popen([sys.executable, "-c", TOOL, layer(folder), folder], stdout=subprocess.PIPE, text=True)
    assert tool.stdout is not None
    pid = int(tool.stdout.readline())
    time.sleep(delay)
    tool.kill()
    tool.wait()
    tool.stdout.close()
    deadline = time.monotonic() + 30
    while alive(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the server outlived its tool, killed after {delay} s")
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_layer_is_finished_without_its_parent(folder: str) -> None:
    """What its header names is not opened, and stays written there."""
    path = os.path.join(folder, "vda.qcow2")
    qcow2.create_layer(path, MIB + 512, backing="../gone.qcow2", compress=True)
    qcow2.finish_layer(path, MIB + 512)
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    assert (info["virtual-size"], info["backing-filename"]) == (MIB + 512, "../gone.qcow2")
    assert info["backing-filename-format"] == "qcow2"


@pytest.mark.parametrize("size", [MIB, MIB + 512, 512])
def test_a_layer_gets_its_exact_size(folder: str, size: int) -> None:
    path = os.path.join(folder, "vda.qcow2")
    qcow2.create_layer(path, size, backing=None, compress=True)
    assert json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))["virtual-size"] % 65536 == 0
    qcow2.finish_layer(path, size)
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    assert info["virtual-size"] == size
    assert info["format-specific"]["data"]["compression-type"] == "zstd"
