"""The guest with an OS: Linux with one ext4 file system per disk, busybox, and QEMU's guest agent."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from typing import Any, Callable, Dict, Final, Mapping, Optional, Tuple

import libvirt
import libvirt_qemu
from lxml import etree

from tests.guests import daemon, domain, initramfs

MIB: Final = 1024 * 1024
BOOT_SECONDS: Final = 120.0  # 6 to 9 alone on two cores
AGENT_SECONDS: Final = 20
# One message to the agent.  Measured: 133 KB of base64 take 0.1 s; of 267 KB and more the end arrives too late or never.
STDIN_BYTES: Final = 48 * 1024


class ExecFailed(Exception):
    """A command inside the guest ended with another code than 0."""


class SystemGuest(domain.Guest):
    """A domain whose disks are mounted on /disks/vda, /disks/vdb, ...

    `files`: for each disk to be made, what it holds at first ({"vda": {"hello": b"world"}}); or `images`: existing
    images to boot from instead, as (path, format) by target, which are used as they are.  `size` in bytes of each new
    disk.  `agent`: "real", or "relay": no agent runs in it, and whoever connects to `relay_path` is the agent
    (fake_agent.FakeAgent); nothing that asks the real one works then.  Errors: daemon.Unavailable.
    """

    def __init__(
        self,
        host: daemon.Daemon,
        name: str = "system",
        *,
        files: Optional[Mapping[str, Mapping[str, bytes]]] = None,
        images: Optional[Mapping[str, Tuple[str, str]]] = None,
        size: int = 64 * MIB,
        agent: str = "real",
    ) -> None:
        super().__init__(host, name)
        assert agent in {"real", "relay"}
        self.relayed = agent == "relay"
        self.relay_path = os.path.join(self.folder, "relay.sock")
        self.images: Dict[str, Tuple[str, str]] = dict(images or {})
        if not images:
            for target, contents in (files or {"vda": {}}).items():
                self.images[target] = (self._make_disk(target, contents, size), "qcow2")
        boot = initramfs.boot()
        # libvirt hands both to QEMU's user, who cannot enter every checkout.
        self._kernel = shutil.copy(boot.kernel, os.path.join(self.folder, "kernel"))
        self._initrd = shutil.copy(boot.initrd, os.path.join(self.folder, "initrd"))
        self.console = os.path.join(self.folder, "console.log")

    def _make_disk(self, target: str, contents: Mapping[str, bytes], size: int) -> str:
        path = os.path.join(self.folder, f"{target}.qcow2")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            files = os.path.join(folder, "files")
            for name, data in {"lost+found/.keep": b"", **contents}.items():
                full = os.path.join(files, name)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "wb") as file:
                    file.write(data)
            raw = os.path.join(folder, "raw")
            with open(raw, "wb") as image:
                image.truncate(size)
            mkfs = shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
            if not mkfs:
                raise daemon.Unavailable("mkfs.ext4 is not installed; script/bootstrap --tests does it")
            for argv in (
                [mkfs, "-q", "-F", "-E", "root_owner=0:0", "-d", files, raw],
                ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path],
            ):
                subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        return path

    def xml(self) -> str:
        disks = [domain.disk_xml(target, path, fmt) for target, (path, fmt) in self.images.items()]
        cmdline = f"console=ttyS0 quiet panic=-1 {initramfs.RELAY if self.relayed else ''}"
        boot = {"kernel": self._kernel, "initrd": self._initrd, "cmdline": cmdline.strip()}
        tree = domain.domain_xml(self, 128 if self.relayed else 256, disks, boot)
        devices = tree.find("devices")
        assert devices is not None
        channel = etree.SubElement(devices, "channel", type="unix")
        etree.SubElement(channel, "target", type="virtio", name=initramfs.AGENT_PORT)
        if self.relayed:
            channel = etree.SubElement(devices, "channel", type="unix")
            etree.SubElement(channel, "source", mode="bind", path=self.relay_path)
            etree.SubElement(channel, "target", type="virtio", name=initramfs.RELAY_PORT)
        serial = etree.SubElement(devices, "serial", type="file")
        etree.SubElement(serial, "source", path=self.console)
        return etree.tostring(tree, encoding="unicode")

    def start(self) -> None:
        """Boots it and waits for the agent, or for the relay."""
        super().start()
        if self.relayed:
            self._wait(lambda: "ready" in self.said(), BOOT_SECONDS, "does not boot")
        else:
            self.wait_for_agent()

    def wait_for_agent(self, seconds: float = BOOT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.agent("guest-ping", seconds=2)
            except libvirt.libvirtError as e:
                if time.monotonic() > deadline:
                    raise AssertionError(f"the agent of {self.name} does not answer: {e}\n{self.said()}") from None
                time.sleep(0.1)
            else:
                return

    @property
    def agent_state(self) -> str:
        """What libvirt says of the agent's port: connected or disconnected."""
        tree = etree.fromstring(self.domain.XMLDesc())
        target = tree.find(f"./devices/channel/target[@name='{initramfs.AGENT_PORT}']")
        assert target is not None
        return target.get("state", "disconnected")

    def wait_for_agent_state(self, state: str, seconds: float = 60) -> None:
        self._wait(lambda: self.agent_state == state, seconds, f"has an agent that is not {state}")

    def untouched(self) -> bool:
        """Whether it runs as after its start, without job and checkpoint; the agent's time limit is made so again."""
        try:
            dom = self.domain
            dom.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, 0)
            runs = dom.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            return runs and dom.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE and not dom.listAllCheckpoints()
        except libvirt.libvirtError:
            return False

    def _wait(self, happened: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"{self.name} {otherwise}: {self.said()}"
            time.sleep(0.05)

    def agent(self, execute: str, *, seconds: int = AGENT_SECONDS, **arguments: Any) -> Any:
        """A command of the guest agent's; its return value.  Errors: libvirtError."""
        command = json.dumps({"execute": execute, "arguments": arguments} if arguments else {"execute": execute})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, command, seconds, 0))["return"]

    def run(self, *argv: str, stdin: bytes = b"", seconds: float = 120) -> bytes:
        """Standard output of a command inside the guest; `stdin` up to STDIN_BYTES.  Errors: ExecFailed with its stderr."""
        assert len(stdin) <= STDIN_BYTES, "more than the agent takes in one message"
        arguments: Dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        started = self.agent("guest-exec", **arguments)
        deadline = time.monotonic() + seconds
        while True:
            status = self.agent("guest-exec-status", pid=started["pid"])
            if status["exited"]:
                break
            assert time.monotonic() < deadline, f"no end of {argv} after {seconds} s"
            time.sleep(0.02)
        if status.get("exitcode") != 0:
            reason = base64.b64decode(status.get("err-data", "")).decode(errors="replace").strip()
            raise ExecFailed(f"{' '.join(argv)}: {reason or status}")
        return base64.b64decode(status.get("out-data", ""))

    def shell(self, script: str, *, stdin: bytes = b"", seconds: float = 120) -> str:
        """Standard output of a line of shell inside the guest."""
        return self.run("/bin/sh", "-c", script, stdin=stdin, seconds=seconds).decode()

    def write_file(self, path: str, data: bytes, *, sync: bool = True) -> None:
        """Writes a file inside the guest (/disks/vda/...); without `sync` it may stay in the guest's memory."""
        for start in range(0, max(len(data), 1), STDIN_BYTES):
            into = ">>" if start else ">"
            self.run("/bin/sh", "-c", f'cat {into} "$1"', "sh", path, stdin=data[start : start + STDIN_BYTES])
        if sync:
            self.run("/bin/sync")

    def read_file(self, path: str) -> bytes:
        return self.run("/bin/cat", path)

    def frozen(self) -> bool:
        """Whether the agent says that the file systems are frozen."""
        return bool(self.agent("guest-fsfreeze-status") == "frozen")

    def shut_down(self) -> None:
        """The guest's own power-off; returns at once."""
        self.domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)

    def said(self) -> str:
        """The end of what it printed on its console."""
        try:
            with open(self.console, encoding="utf-8", errors="replace") as console:
                return console.read()[-4000:]
        except OSError as e:
            return str(e)
