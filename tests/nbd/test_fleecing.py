"""The shape of libvirt's pull mode, made by a storage daemon: the frozen moment is read while the disk is written."""

from __future__ import annotations

import json
import os
import random
import socket
from typing import Any, Dict, List, Optional, Tuple

import nbd
import pytest

from libvirt_cbt import extents
from libvirt_cbt.nbdio import server
from tests.guests.proxy import Proxy
from tests.nbd.conftest import MIB, Chain, run, served

SIZE = 24 * MIB + 512


class Guest:
    """A disk in a storage daemon that writes to it like a guest, and fleecing points of it as libvirt makes them."""

    def __init__(self, folder: str) -> None:
        self.folder, self.model = folder, bytearray(SIZE)
        self.generation = 0
        self._monitor = socket.socket(socket.AF_UNIX)
        self._disk: Any = nbd.NBD()

    def connect(self) -> None:
        self._monitor.connect(f"{self.folder}/qmp.sock")
        self._lines = self._monitor.makefile("r", encoding="utf-8")
        self._lines.readline()
        self.qmp("qmp_capabilities")
        self._disk.set_export_name("disk")
        self._disk.connect_unix(f"{self.folder}/guest.sock")

    def close(self) -> None:
        self._disk.shutdown()
        self._lines.close()
        self._monitor.close()

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "error" not in answer, f"{command}: {answer}"
        return answer["return"]

    def write(self, offset: int, length: int, byte: int) -> None:
        self._disk.pwrite(bytes([byte]) * length, offset)
        self.model[offset : offset + length] = bytes([byte]) * length

    def zero(self, offset: int, length: int) -> None:
        self._disk.zero(length, offset)
        self.model[offset : offset + length] = bytes(length)

    def freeze(self) -> Tuple[server.Endpoint, bytes, str]:
        """Scratch, transaction of backup, old bitmap stopped and new one begun, export: one moment."""
        old, self.generation = f"b{self.generation}", self.generation + 1
        new, scratch = f"b{self.generation}", f"{self.folder}/scratch{self.generation}"
        run("qemu-img", "create", "-q", "-f", "qcow2", scratch, str(SIZE))
        file = {"driver": "file", "filename": scratch}
        self.qmp("blockdev-add", **{"driver": "qcow2", "node-name": "scratch", "backing": "disk", "file": file})
        actions: List[Dict[str, Any]] = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": new}},
            {"type": "blockdev-backup", "data": {"job-id": "j", "device": "disk", "target": "scratch", "sync": "none"}},
        ]
        bitmaps = {}
        if self.generation > 1:
            actions.insert(0, {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": old}})
            bitmaps = {"bitmaps": [{"node": "disk", "name": old}]}
        self.qmp("transaction", actions=actions)
        self.qmp("block-export-add", **{"type": "nbd", "id": "x", "node-name": "scratch", "name": "point", **bitmaps})
        return server.Endpoint(f"{self.folder}/guest.sock", "point"), bytes(self.model), old

    def thaw(self) -> None:
        self.qmp("block-export-del", id="x")  # fails while a client is connected: that is tested too
        self.qmp("job-cancel", id="j")
        while self.qmp("query-jobs"):
            pass
        self.qmp("blockdev-del", **{"node-name": "scratch"})


def daemon(folder: str) -> List[str]:
    disk = os.path.join(folder, "disk.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE))
    node = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": disk}}
    return [
        "qemu-storage-daemon",
        *("--chardev", f"socket,id=m,path={folder}/qmp.sock,server=on,wait=off"),
        *("--monitor", "chardev=m"),
        *("--nbd-server", f"addr.type=unix,addr.path={folder}/guest.sock"),
        *("--blockdev", json.dumps(node)),
        *("--export", "type=nbd,id=d,node-name=disk,name=disk,writable=on"),
    ]


@pytest.mark.parametrize("cut", [False, True])
def test_a_moment_is_read_while_the_guest_writes_on(folder: str, rng: random.Random, *, cut: bool) -> None:
    """Also over a wire that is cut three times: the moment stays the same, and no lost client holds up its end."""
    with served(daemon(folder), f"{folder}/guest.sock"):
        guest, chain = Guest(folder), Chain(folder)
        guest.connect()

        def busy(*_: Any) -> None:
            """The guest goes on, in the middle of the copy."""
            offset = rng.randrange(SIZE - 70000) // 512 * 512
            if rng.random() < 0.7:
                guest.write(offset, rng.randrange(1, 130) * 512, rng.randrange(1, 256))
            else:
                guest.zero(offset, rng.randrange(1, 130) * 512)

        for generation in range(5):
            for _ in range(10):
                busy()
            source, model, bitmap = guest.freeze()
            before = guest.model[:]
            budgets: List[Optional[int]] = []
            for _ in range(3 if cut else 0):  # an increment has a second connection each time, for the bitmap
                budgets += [1000 + rng.randrange(100 * 1024), *([None] if generation else [])]
            with Proxy.in_front_of(source.socket, budgets=budgets):
                chain.backup(source, model, bitmap if generation else None, progress=busy)
            assert chain.layers[-1].pulled.reconnects == (3 if cut else 0)
            assert guest.model != before or not extents.total(chain.layers[-1].delta)
            guest.thaw()
        guest.close()
        chain.prove()
