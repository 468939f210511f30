"""The private libvirtd, guests with disks of any size, and the commands that are measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Final, Iterator, List, Mapping, Optional, Sequence, Tuple

import libvirt
import numpy as np
from lxml import etree

from tests.bench.measuring import Sample, timed
from tests.guests import daemon, domain

MIB: Final = 1 << 20
COMMAND: Final = os.path.join(os.path.dirname(sys.executable), "libvirt-cbt")
WORDS: Final = 4096  # of the vocabulary that text is made of


def run(*argv: str, env: Optional[Mapping[str, str]] = None) -> str:
    """Standard output.  Errors: RuntimeError with what the command complained of."""
    done = subprocess.run(
        argv, env=None if env is None else {**env}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


@contextmanager
def server(socket: str, *argv: str, env: Optional[Mapping[str, str]] = None) -> Iterator[None]:
    """A server that listens on `socket`, which nothing is at yet; ended in order, also when we are."""
    process = subprocess.Popen(
        argv, env=None if env is None else {**env}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while not os.path.exists(socket):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}")
            time.sleep(0.002)
        yield
    finally:
        process.terminate()
        process.wait()


def mixed(size: int, seed: int = 1) -> Iterator[bytes]:
    """Pieces of 1 MiB, by turns random (it does not compress) and words (it does, to a third or so)."""
    rng = np.random.default_rng(seed)
    vocabulary = [rng.integers(97, 123, int(n), np.uint8).tobytes() + b" " for n in rng.integers(2, 12, WORDS)]
    for number in range(size // MIB):
        if number % 2 == 0:
            yield rng.bytes(MIB)
        else:
            # Frequent words are frequent, as in a language.
            chosen = (rng.random(MIB // 4) ** 3 * WORDS).astype(int)
            yield b"".join(vocabulary[i] for i in chosen.tolist())[:MIB].ljust(MIB)


class Guest(domain.Guest):
    """A guest without an OS; `disks` are images that exist, by target."""

    def __init__(self, host: daemon.Daemon, name: str) -> None:
        super().__init__(host, name)
        self.disks: Dict[str, str] = {}

    def add(self, target: str, size: int, data: int = 0, seed: int = 1) -> None:
        """A qcow2 disk of `size` bytes that begins with `data` bytes of mixed data."""
        path = os.path.join(self.folder, f"{target}.qcow2")
        if data:
            raw = f"{path}.raw"
            with open(raw, "wb") as file:
                file.writelines(mixed(data, seed))
                file.truncate(size)
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
            os.unlink(raw)
        else:
            run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
        self.disks[target] = path

    def xml(self) -> str:
        rows = [domain.disk_xml(target, path, "qcow2") for target, path in self.disks.items()]
        return etree.tostring(domain.domain_xml(self, 32, rows), encoding="unicode")

    def write(self, target: str, offsets: Sequence[int], length: int) -> None:
        """Writes the same random bytes at each offset, as the guest's own writes would be."""
        source = os.path.join(self.folder, "write")
        with open(source, "wb") as file:
            file.write(os.urandom(length))
        os.chmod(source, 0o644)
        for offset in offsets:
            device = f"/machine/peripheral/ua-{target}/virtio-backend"
            said = self.hmp(f'qemu-io -d {device} "write -q -s {source} {offset} {length}"')
            assert "rror" not in said, said


class World:
    """Starts what a row asks for when it first asks; a context manager that leaves nothing."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self._stack = ExitStack()
        self._host: Optional[daemon.Daemon] = None
        self._made: Dict[str, Any] = {}
        self.folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cbt-bench-"))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def host(self) -> daemon.Daemon:
        if self._host is None:
            self._host = self._stack.enter_context(daemon.Daemon())
        return self._host

    @property
    def environment(self) -> Dict[str, str]:
        return {**os.environ, **self.host.environment()}

    def new(self, name: str) -> str:
        """A path in the folder of this run at which nothing is."""
        path = os.path.join(self.folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
        return path

    def guest(self, name: str, disks: Mapping[str, Tuple[int, int]]) -> Guest:
        """A running guest, the same one for all who ask for this name; (size, data) in bytes by target."""
        if name not in self._made:
            guest = Guest(self.host, name)
            self._stack.callback(guest.remove)
            for number, (target, (size, data)) in enumerate(disks.items()):
                guest.add(target, size, data, seed=number + 1)
            guest.define()
            guest.start()
            self._made[name] = guest
        found: Guest = self._made[name]
        return found

    def started(self, name: str, guest: domain.Guest) -> Any:
        """Defines and starts any other guest, and ends it with the world."""
        if name not in self._made:
            self._stack.callback(guest.remove)
            guest.define()
            guest.start()
            self._made[name] = guest
        return self._made[name]

    def argv(self, repository: str, command: str, *arguments: str) -> List[str]:
        scratch = ["--scratch-dir", self.host.scratch] if command in ("backup", "mark") else []
        quiesce = [] if "--quiesce" in arguments or not scratch else ["--quiesce", "none"]
        return [COMMAND, "-r", repository, "--json", command, *arguments, *scratch, *quiesce]

    def ours(self, repository: str, command: str, *arguments: str, into: Optional[List[Sample]] = None) -> Any:
        """The command as a user runs it, process start to exit; its first result."""
        with timed([] if into is None else into):
            text = run(*self.argv(repository, command, *arguments), env=self.environment)
        return json.loads(text)["results"][0]

    def init(self, name: str) -> str:
        """A new repository."""
        path = self.new(name)
        run(COMMAND, "-r", path, "init")
        return path

    def forget(self, guest: domain.Guest) -> None:
        """Takes every checkpoint off a guest."""
        for one in guest.domain.listAllCheckpoints():
            one.delete(0)


def job_xml(guest: Guest, socket: str, scratch: Mapping[str, str], since: Optional[str]) -> str:
    """A pull job over all disks."""
    root = etree.Element("domainbackup", mode="pull")
    if since:
        etree.SubElement(root, "incremental").text = since
    etree.SubElement(root, "server", transport="unix", socket=socket)
    disks = etree.SubElement(root, "disks")
    for target in scratch:
        disk = etree.SubElement(disks, "disk", name=target, backup="yes", type="file")
        etree.SubElement(disk, "driver", type="qcow2")
        etree.SubElement(disk, "scratch", file=scratch[target])
    return etree.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, targets: Sequence[str]) -> str:
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    disks = etree.SubElement(root, "disks")
    for target in targets:
        etree.SubElement(disks, "disk", name=target, checkpoint="bitmap")
    return etree.tostring(root, encoding="unicode")


def bare_socket(world: World) -> str:
    """Where a bare job exports: in a folder that QEMU may write to."""
    folder = os.path.join(world.host.root, "bare")
    if not os.path.isdir(folder):
        os.mkdir(folder)
        os.chown(folder, -1, world.host.qemu_ids[1])
        os.chmod(folder, 0o770)
    return os.path.join(folder, "sock")


@contextmanager
def prepared(world: World, guest: Any, sizes: Mapping[str, int]) -> Iterator[Tuple[str, str, str]]:
    """Scratch made beforehand for a bare job: (job, checkpoint, the checkpoint's name); the rest is undone afterwards.

    It counts from the guest's newest checkpoint, as our own job does, and records a new one.
    """
    leaves = guest.domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_LEAVES)
    leaf = leaves[0].getName() if leaves else None
    scratch = {t: os.path.join(world.host.scratch, f"bare-{t}.qcow2") for t in sizes}
    for target, path in scratch.items():
        run("qemu-img", "create", "-q", "-f", "qcow2", path, str(sizes[target]))
        os.chown(path, *world.host.qemu_ids)
    name = f"bare-{os.urandom(4).hex()}"
    socket = bare_socket(world)
    try:
        yield job_xml(guest, socket, scratch, leaf), checkpoint_xml(name, [*sizes]), name
    finally:
        for path in (*scratch.values(), socket):
            if os.path.lexists(path):
                os.unlink(path)


def bare(world: World, guest: Guest, into: List[Sample]) -> None:
    """libvirt's own begin, with a checkpoint in the same transaction, and abort; nothing else is in the time."""
    sizes = {target: guest.domain.blockInfo(target)[0] for target in guest.disks}
    with prepared(world, guest, sizes) as (job, checkpoint, name):
        dom = guest.domain
        with timed(into):
            dom.backupBegin(job, checkpoint, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)
            dom.abortJob()
            while dom.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                pass
        dom.checkpointLookupByName(name).delete(0)
