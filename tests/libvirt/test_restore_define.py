"""`restore --define`: a domain of its own from a backup, valid to libvirt, which boots; nothing of the original's is taken."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import libvirt
import pytest
from lxml import etree

from libvirt_cbt import xmldoc
from libvirt_cbt.hypervisor import defining
from tests.guests import daemon, system
from tests.guests.plain import MIB, Disk, PlainGuest
from tests.libvirt.tool import Tool, models, same

LIVE = """<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><genid>e9392370-2917-565e-692b-d057f46512d6</genid>
  <metadata><x:y xmlns:x='http://example.org/x'>kept</x:y></metadata>
  <memory unit='KiB'>219136</memory><vcpu>1</vcpu>
  <sysinfo type='smbios'><system><entry name='uuid'>c7a5fdbd-edaf-9455-926a-d65c16db1809</entry></system></sysinfo>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap'/>
      <source file='/i/vda.snap' index='3'><seclabel model='dac' relabel='no'/></source>
      <backingStore type='file' index='4'><format type='qcow2'/><source file='/i/vda'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/><serial>S1</serial><encryption format='luks'><secret type='passphrase' uuid='c7a5fdbd-edaf-9455-926a-d65c16db1809'/></encryption>
      <boot order='1'/><alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw'/><auth username='a'><secret type='ceph' uuid='c7a5fdbd-edaf-9455-926a-d65c16db1809'/></auth>
      <source protocol='rbd' name='p/vdb'><host name='h' port='6789'/></source><target dev='vdb' bus='virtio'/></disk>
    <disk type='file' device='disk'><source file='/i/seed.raw'/><target dev='vdc' bus='virtio'/><readonly/></disk>
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/i/x.iso' index='1'/><backingStore/><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:11:22:33'/><source network='default' portid='c7a5fdbd-edaf-9455-926a-d65c16db1809' bridge='virbr0'/>
      <target dev='vnet5'/><model type='virtio'/><alias name='net0'/></interface>
    <serial type='file'><source path='/log/web'/><target port='0'/><alias name='serial0'/></serial>
    <console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><target type='virtio' port='1'/></console>
    <channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/7-web/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <channel type='unix'><source mode='bind' path='/run/mine.sock'/><target type='virtio' name='mine'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='5907' autoport='yes' listen='127.0.0.1'><listen type='address' address='127.0.0.1'/></graphics>
    <graphics type='spice' port='5999' autoport='no'><listen type='address'/></graphics>
    <hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' bus='0x06' slot='0x02' function='0x0'/></source></hostdev>
    <vsock model='virtio'><cid auto='no' address='3'/></vsock>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+109</label><imagelabel>+64055:+109</imagelabel></seclabel>
  <qemu:commandline><qemu:arg value='-newarg'/></qemu:commandline>
</domain>"""


@pytest.fixture
def made(libvirtd: daemon.Daemon) -> Iterator[List[str]]:
    """Names of domains that are removed at the end."""
    names: List[str] = []
    yield names
    for name in names:
        try:
            domain = libvirtd.domain(name)
        except libvirt.libvirtError:
            continue
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)


def valid(text: str, folder: Path) -> etree._Element:
    """Judged by libvirt's schema."""
    (folder / "judged.xml").write_text(text, encoding="utf-8")
    argv = ["virt-xml-validate", str(folder / "judged.xml"), "domain"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + text
    return etree.fromstring(text.encode())


def test_the_document_of_a_copy(tmp_path: Path) -> None:
    images = {"vda": defining.Image("/new/vda.raw", "raw"), "vdb": defining.Image("/new/vdb.qcow2", "qcow2")}
    uuid = defining.new_uuid()
    text, warnings = defining.document(LIVE, defining.Copy("copy", uuid, images, nvram="/new/copy_VARS.fd"))
    root = valid(text, tmp_path)
    for gone in ("c7a5fdbd", "vnet5", "virbr0", "52:54:00:11:22:33", "/i/", "/log/web", "/dev/pts", "mine", "5907",
                 "5999", "portid", "alias", "64055", "0x06", "newarg", "rbd", "luks", "seed"):  # fmt: skip
        assert gone not in text, gone
    assert (root.findtext("name"), root.findtext("uuid"), root.get("id")) == ("copy", uuid, None)
    assert root.findtext("sysinfo/system/entry") == uuid and root.find("genid") is not None
    assert root.find("metadata/{http://example.org/x}y") is not None
    assert [d.get("device") for d in root.iterfind("devices/disk")] == ["disk", "disk", "cdrom"]
    assert [s.get("file") for s in root.iterfind("devices/disk/source")] == ["/new/vda.raw", "/new/vdb.qcow2"]
    assert [d.get("type") for d in root.iterfind("devices/disk/driver")] == ["raw", "qcow2", "raw"]
    assert root.findtext("devices/disk/serial") == "S1" and root.findtext("os/nvram") == "/new/copy_VARS.fd"
    assert root.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"  # type: ignore[union-attr]
    said = " ".join(warnings)
    assert all(word in said for word in ("vdc", "encrypted", "TPM", "host device", "serial"))


def test_the_document_with_the_same_identity(tmp_path: Path) -> None:
    images = {"vda": defining.Image("/new/vda.qcow2", "qcow2")}
    text, warnings = defining.document(LIVE, defining.Copy("web", None, images))
    root = valid(text, tmp_path)
    assert root.findtext("uuid") == "c7a5fdbd-edaf-9455-926a-d65c16db1809"
    assert "52:54:00:11:22:33" in text and "/log/web" in text and "0x06" in text and "newarg" in text
    assert "vnet5" not in text and "alias" not in text
    assert not root.findtext("os/nvram") and any("UEFI" in w for w in warnings)


HOSTILE = LIVE.replace(
    "<nvram template", "<kernel>/etc/shadow</kernel><initrd>/root/key</initrd><nvram template"
).replace(
    "</devices>",
    "<emulator>/home/evil/qemu</emulator>"
    "<filesystem type='mount' accessmode='passthrough'><source dir='/'/><target dir='all'/></filesystem>"
    "<shmem name='other'><model type='ivshmem-doorbell'/><server path='/run/evil.sock'/></shmem>"
    "<input type='evdev'><source dev='/dev/input/event0'/></input>"
    "<rng model='virtio'><backend model='random'>/dev/evil</backend></rng></devices>",
).replace("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
          "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>").replace(
    "<seclabel type='dynamic'", "<seclabel type='static' model='dac' relabel='yes'><label>+0:+0</label></seclabel><seclabel type='dynamic'"
)  # fmt: skip


@pytest.mark.parametrize("uuid", [None, "6547b6b6-6ddd-4616-9d10-391bfb2a34f7"])
def test_what_a_document_reaches_on_this_host_is_left_out_or_named(tmp_path: Path, uuid: Optional[str]) -> None:
    """Whoever could write to the repository chose what the domain's QEMU is, runs as and opens."""
    images = {"vda": defining.Image("/new/vda.raw", "raw"), "vdb": defining.Image("/new/vdb.raw", "raw")}
    text, warnings = defining.document(HOSTILE, defining.Copy("copy", uuid, images, nvram="/new/copy_VARS.fd"))
    root = valid(text, tmp_path)
    said = " ".join(warnings)
    for reached in (
        "/home/evil/qemu",
        "/etc/shadow",
        "/root/key",
        "/dev/evil",
        "/run/evil.sock",
        "/dev/input",
        "/dev/tpm0",
        "+0:+0",
    ):
        assert reached not in text or reached in said, reached
    assert "/etc/shadow (kernel)" in said and "/root/key" in said and "/dev/evil" in said
    assert "/new/" not in said and "OVMF" not in said
    left = [
        root.find(p) is not None
        for p in ("devices/emulator", "seclabel", "devices/filesystem", "devices/shmem", "devices/tpm")
    ]
    assert set(left) == {uuid is None}


def test_overlay_document(tmp_path: Path) -> None:
    images = {"vda": defining.Image("/o/vda.qcow2", "qcow2", ("/r/s", "vda"))}
    copy = defining.Copy("b", defining.new_uuid(), images, links_down=True, record='{"a": "<&>"}')
    text, _ = defining.document(LIVE, copy)
    root = valid(text, tmp_path)
    assert defining.record(text) == '{"a": "<&>"}' and defining.record(LIVE) is None
    assert root.find("devices/interface/link").get("state") == "down"  # type: ignore[union-attr]


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_copy_beside_the_original(tool: Tool, libvirtd: daemon.Daemon, made: List[str], fmt: str) -> None:
    made.append("copy")
    with PlainGuest(libvirtd, "plain", [Disk("vda", 4 * MIB), Disk("vdb", 2 * MIB, fmt="raw")]) as guest:
        guest.define()
        guest.start()
        guest.write("vda", MIB, 65536, 0x5A)
        guest.write("vdb", 0, 512, 0x7B)
        tool.backup(guest)
        output = os.path.join(libvirtd.images, f"copy-{fmt}")
        arguments = ["restore", "plain", "--output", output, "--format", fmt, "--define"]
        taken = tool.run(*arguments, "plain")
        assert (taken.code, taken.document["error"]["kind"]) == (11, "IdentityTaken")
        taken = tool.run(*arguments, "copy", "--same-identity")
        assert (taken.code, taken.document["error"]["kind"]) == (11, "IdentityTaken")
        assert not os.path.exists(output)
        found = tool.run(*arguments, "copy", "--start").result
        copy = libvirtd.domain("copy")
        assert copy.isActive() and copy.UUIDString() == found["defined"]["uuid"] != guest.uuid
        assert guest.running
        os.chmod(output, 0o755)
        copy.destroy()
        images = {f["target"]: f["path"] for f in found["files"]}
        content = {}
        for target, path in images.items():
            raw = f"{output}/{target}.converted"
            subprocess.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw], check=True)
            content[target] = Path(raw).read_bytes()
        same(content, models(guest))
    # The original has gone: its identity may be taken up again.
    again = os.path.join(libvirtd.images, f"again-{fmt}")
    found = tool.run("restore", "plain", "--output", again, "--define", "plain", "--same-identity").result
    made.append("plain")
    assert found["defined"]["uuid"] == guest.uuid == libvirtd.domain("plain").UUIDString()


def test_uefi_variables(tool: Tool, libvirtd: daemon.Daemon, made: List[str], tmp_path: Path) -> None:
    class Firmware(PlainGuest):
        def xml(self) -> str:
            root = etree.fromstring(super().xml())
            system = root.find("os")
            assert system is not None
            etree.SubElement(system, "loader", readonly="yes", type="pflash").text = f"{self.folder}/CODE.fd"
            etree.SubElement(system, "nvram").text = f"{self.folder}/VARS.fd"
            return etree.tostring(root, encoding="unicode")

    made.append("copy")
    variables = os.urandom(4096) + bytes(256 * 1024 - 4096)
    with Firmware(libvirtd, "firmware", [Disk("vda", MIB)]) as guest:
        Path(f"{guest.folder}/CODE.fd").write_bytes(bytes(512 * 1024))
        Path(f"{guest.folder}/VARS.fd").write_bytes(variables)
        guest.define()
        guest.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        backup = tool.backup(guest)["backup"]
        output = os.path.join(libvirtd.images, "firmware-copy")
        found = tool.run("restore", "firmware", "--output", output, "--define", "copy").result
        assert Path(found["defined"]["nvram"]).read_bytes() == variables
        assert f">{output}/copy_VARS.fd</nvram>" in libvirtd.domain("copy").XMLDesc()
        assert found["warnings"] == [f"it uses what this host has at {guest.folder}/CODE.fd (loader)"]
        path = f"{tool.repository}/{guest.uuid}/backups/{backup}/nvram"
        assert os.stat(path).st_mode & 0o077 == 0
        with open(path, "r+b") as file:
            file.write(b"x" * 8)
        assert tool.run("verify", "firmware").code == 16
        damaged = tool.run("restore", "firmware", "--output", str(tmp_path / "o"), "--define", "other")
        assert damaged.code == 16 and not (tmp_path / "o").exists()
        libvirtd.domain("copy").undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        os.unlink(f"{guest.folder}/VARS.fd")
        warned = tool.backup(guest)
        assert any("UEFI variables are not in this backup" in w for w in warned["warnings"])
        guest.domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        )


@pytest.mark.skipif(not shutil.which("swtpm_setup"), reason="needs swtpm")
def test_the_state_of_a_tpm(tool: Tool, libvirtd: daemon.Daemon, made: List[str], tmp_path: Path) -> None:
    class Sealed(PlainGuest):
        def xml(self) -> str:
            root = etree.fromstring(super().xml())
            device = etree.SubElement(xmldoc.find(root, "devices"), "tpm", model="tpm-crb")
            etree.SubElement(device, "backend", type="emulator", version="2.0")
            return etree.tostring(root, encoding="unicode")

    def state(uuid: str) -> Path:
        return Path(libvirtd.swtpm, uuid, "tpm2/tpm2-00.permall")

    made.append("copy")
    with Sealed(libvirtd, "sealed", [Disk("vda", MIB)]) as guest:
        guest.define()
        guest.start()
        backup = tool.backup(guest)
        assert not any("TPM" in warning for warning in backup["warnings"])
        held = state(guest.uuid).read_bytes()
        path = f"{tool.repository}/{guest.uuid}/backups/{backup['backup']}/tpm"
        assert Path(path).read_bytes() == held and os.stat(path).st_mode & 0o077 == 0
        restoring = ["restore", "sealed", "--output", os.path.join(libvirtd.images, "sealed-copy"), "--define", "copy"]
        found = tool.run(*restoring).result
        assert found["warnings"] == []
        copy = libvirtd.domain("copy")
        valid(copy.XMLDesc(), tmp_path)
        assert state(copy.UUIDString()).read_bytes() == held
        copy.create()
        # libvirt has found a state, and made none: the seeds and sealed keys are those of the original.
        log = Path(libvirtd.root, "state/var/log/swtpm/libvirt/qemu/copy-swtpm.log")
        assert copy.isActive() and (not log.exists() or "manufacturing" not in log.read_text(errors="replace"))
        assert state(copy.UUIDString()).exists()
        copy.destroy()
        copy.undefine()
        assert not state(copy.UUIDString()).exists()
        made.remove("copy")
        # Gone: said, and the backup is made.
        guest.destroy()
        state(guest.uuid).unlink()
        assert any("TPM is not in this backup" in warning for warning in tool.backup(guest)["warnings"])


def test_a_restored_domain_boots(
    tool: Tool, libvirtd: daemon.Daemon, system_guest: Callable[..., system.SystemGuest], made: List[str]
) -> None:
    guest = system_guest(files={"vda": {"hello": b"world"}})
    tool.run("backup", guest.name, "--quiesce", "agent").result  # noqa: B018
    guest.destroy()
    made.append("again")
    output = os.path.join(libvirtd.images, "booted")
    tool.run("restore", guest.name, "--output", output, "--format", "qcow2", "--define", "again", "--start").result  # noqa: B018
    copy: Any = system.SystemGuest.__new__(system.SystemGuest)
    copy.host, copy.name, copy.console = libvirtd, "again", guest.console
    copy.wait_for_agent()
    assert copy.read_file("/disks/vda/hello") == b"world"
