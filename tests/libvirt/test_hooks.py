"""libvirt's hook on a real libvirtd, which calls it; and what `recover` makes of what it has noted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import libvirt
import pytest
from lxml import etree

from tests.guests import daemon, plain
from tests.libvirt.tool import Tool, models, same

Guest = plain.PlainGuest


@pytest.fixture
def tool(libvirtd: daemon.Daemon, tmp_path: Path) -> Iterator[Tool]:
    if not libvirtd.privileged:
        pytest.skip("libvirt calls hooks of root's daemon only from a place that is not the host's")
    made = Tool(libvirtd, str(tmp_path / "repository"))
    installed(made)
    libvirtd.restart()  # a daemon that had no hook when it started calls none
    yield made
    made.run("hooks", "remove", "libvirt", "--directory", libvirtd.hooks, "--unit-dir", "")


def installed(tool: Tool) -> None:
    os.makedirs(tool.host.hooks, exist_ok=True)
    tool.run("hooks", "install", "libvirt", "--directory", tool.host.hooks, "--unit-dir", "").result  # noqa: B018


def noted(tool: Tool, guest: Guest) -> List[str]:
    """Kinds of events of a guest that wait."""
    (place,) = Path(tool.host.root, "spool").iterdir()
    files = [path.name for folder in ("new", "taken") for path in (place / folder).iterdir()]
    return sorted(name[len(guest.uuid) + 1 :] for name in files if name.startswith(guest.uuid))


def recovered(tool: Tool) -> Dict[str, Any]:
    """What `recover --noted` did, by domain."""
    ended = tool.run("recover", "--noted")
    assert ended.code == 0, ended.stderr
    return {one["domain"]: one["actions"] for one in ended.document["results"]}


def until(happened: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def forget(guest: Guest) -> None:
    """As if libvirt's folder of checkpoints had been lost, while the bitmaps are in the images."""
    for checkpoint in guest.domain.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def modes(tool: Tool, guest: Guest, *arguments: str) -> Dict[str, str]:
    return {disk["target"]: disk["mode"] for disk in tool.backup(guest, *arguments)["disks"]}


def checkpoints(guest: Guest) -> List[str]:
    return sorted(checkpoint.getName() for checkpoint in guest.domain.listAllCheckpoints())


def test_a_checkpoint_that_was_lost_is_back_after_a_start_and_a_restore(
    tool: Tool, plain_guest: Callable[..., Guest], tmp_path: Path, rng: random.Random
) -> None:
    guest, other = plain_guest(plain.Disk("vda")), plain_guest(plain.Disk("vda"), name="other")
    made = tool.backup(guest)
    back = [f"gave checkpoint {made['checkpoint']} of generation 1 back to libvirt"]
    assert noted(tool, guest) == []  # the backup has looked into its start
    assert noted(tool, other) == ["started"]
    forget(guest)
    guest.destroy()
    guest.start()
    assert noted(tool, guest) == ["started", "stopped"]
    assert recovered(tool) == {guest.name: back}
    assert checkpoints(guest) == [made["checkpoint"]]
    assert noted(tool, guest) == noted(tool, other) == []  # of the other nothing is stored
    saved = os.path.join(guest.folder, "saved")
    forget(guest)
    guest.domain.save(saved)
    tool.host.connection.restore(saved)
    assert recovered(tool) == {guest.name: back}
    assert recovered(tool) == {}
    guest.random_writes(rng, "vda", 5)
    assert modes(tool, guest) == {"vda": "incremental"}
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


class OtherHost(daemon.Daemon):
    """A second daemon that passes for another host."""

    def _configuration(self) -> str:
        path = super()._configuration()
        with open(path, "a", encoding="utf-8") as conf:
            conf.write(f'host_uuid = "{uuid.uuid4()}"\n')
        return path


def test_a_guest_that_has_migrated_in_has_its_checkpoint_before_the_next_backup(
    tool: Tool, plain_guest: Callable[..., Guest], tmp_path: Path, rng: random.Random
) -> None:
    guest, here = plain_guest(plain.Disk("vda"), start=False), tool.host
    large = guest.xml().replace('<memory unit="MiB">32', '<memory unit="MiB">1024')
    here.connection.defineXML(large)
    guest.start()
    made = tool.backup(guest)
    with OtherHost() as there:
        try:
            tool.host = there
            installed(tool)
            there.restart()
            flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNSAFE
            slowly = {libvirt.VIR_MIGRATE_PARAM_URI: "tcp:127.0.0.1", libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1}
            source = guest.pid
            moving = threading.Thread(target=guest.domain.migrate3, args=(there.connection, slowly, flags))
            moving.start()
            try:
                # The hook is called when the guest is only on its way: its memory is still to come.
                until(lambda: noted(tool, guest) == ["started"], "the hook was not called")
                os.kill(source, signal.SIGSTOP)
                ended = tool.run("recover", "--noted")
                assert (ended.code, noted(tool, guest)) == (11, ["started"]), ended
                assert "busy with an incoming migration" in ended.document["results"][0]["left"][0]
            finally:
                os.kill(source, signal.SIGCONT)
                moving.join(60)
            guest.host = there
            assert checkpoints(guest) == []
            assert recovered(tool) == {guest.name: [f"gave checkpoint {made['checkpoint']} of generation 1 back to libvirt"]}
            assert checkpoints(guest) == [made["checkpoint"]]
            guest.random_writes(rng, "vda", 5)
            assert modes(tool, guest) == {"vda": "incremental"}
            same(tool.restored(guest, "latest", str(tmp_path)), models(guest))
            tool.host = here
            assert noted(tool, guest) == ["stopped"]
            assert recovered(tool) == {guest.name: []}  # it is off here, and its image is in use there
        finally:
            if guest.host is there:
                guest.destroy()
                guest.host = tool.host = here


def panicking(guest: Guest) -> str:
    """Its XML with a device by which a guest tells of its own death."""
    tree = etree.fromstring(guest.xml())
    devices = tree.find("devices")
    assert devices is not None
    etree.SubElement(etree.SubElement(devices, "panic", model="isa"), "address", type="isa", iobase="0x505")
    return etree.tostring(tree, encoding="unicode")


def test_after_a_crash_a_chain_is_suspect_until_it_was_proved(
    tool: Tool, plain_guest: Callable[..., Guest], tmp_path: Path, rng: random.Random
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="crashes", start=False)
    tool.host.connection.defineXML(panicking(guest))
    guest.start()
    tool.backup(guest)
    # QEMU is killed: its bitmaps are lost, and that is known hours before the next backup.
    guest.kill()
    (sentence,) = recovered(tool)[guest.name]
    assert sentence.startswith("noted that the guest or its QEMU crashed at ")
    guest.start()
    assert recovered(tool) == {
        guest.name: ["the bitmaps of generation 1 are lost (vda): the next backup copies all of them"]
    }
    assert "backup --audit crashes" in tool.run("status", guest.name).result["doubt"]
    assert modes(tool, guest) == {"vda": "full"}
    assert tool.run("status", guest.name).result["doubt"] is None
    # The guest itself dies and QEMU ends in order: the bitmaps live, and what they say is proved by an audit.
    guest.hmp("o /b 0x505 1")
    guest.wait_until_off()
    assert guest.domain.state() == [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED]
    assert len(recovered(tool)[guest.name]) == 1
    guest.start()
    guest.random_writes(rng, "vda", 5)
    made = tool.backup(guest)
    assert made["disks"][0]["mode"] == "incremental"
    assert [w for w in made["warnings"] if "crashed at" in w and "rests on its bitmaps" in w]
    made = tool.backup(guest, "--audit")
    assert not [w for w in made["warnings"] if "crashed" in w]
    assert tool.run("status", guest.name).result["doubt"] is None
    assert not [w for w in tool.backup(guest)["warnings"] if "crashed" in w]
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_snapshot_that_was_put_back_begins_new_lineages(
    tool: Tool, plain_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="reverted")
    guest.write("vda", 0, 65536, 0x11)
    guest.domain.snapshotCreateXML("<domainsnapshot><name>s</name></domainsnapshot>")
    before = bytes(guest.disks["vda"].model)
    guest.write("vda", 0, 65536, 0x22)
    tool.backup(guest)
    # With our bitmap in the image QEMU refuses, whether the guest runs (libvirt has ended it by then, and not in order) or
    # is off, of which no hook is told.
    for _ in range(2):
        with pytest.raises(libvirt.libvirtError):
            guest.domain.revertToSnapshot(guest.domain.snapshotLookupByName("s"))
        assert not guest.running
    guest.start()
    told = libvirt.getVersion() >= 10_005_000  # then the hook is called for it, even when QEMU refuses
    (sentence,) = recovered(tool)[guest.name]
    if told:
        assert sentence.startswith("noted that the guest was put back to a snapshot at ")
    else:
        assert sentence == "the bitmaps of generation 1 are lost (vda): the next backup copies all of them"
    assert modes(tool, guest) == {"vda": "full"}
    # Without it, libvirt 9.0 calls the hook as for any end and start; why it runs is known all the same.  11.3 says why.
    tool.run("untrack", guest.name).result  # noqa: B018
    guest.domain.revertToSnapshot(guest.domain.snapshotLookupByName("s"))
    guest.disks["vda"].model[:] = before
    assert noted(tool, guest) == (["reverted", "started"] if told else ["started", "stopped"])
    sentence, *lost = recovered(tool)[guest.name]
    assert sentence.startswith("noted that the guest was put back to a snapshot at ")
    assert all(one.startswith("the bitmaps of generation 2 are lost (vda)") for one in lost) and (told or len(lost) == 1)
    assert "begins new lineages" in tool.run("status", guest.name).result["doubt"]
    assert modes(tool, guest) == {"vda": "full"}
    # As libvirt from 10.5 on calls it: no bitmap is believed then, sound as it may look.
    (script,) = os.listdir(tool.host.hooks)
    call = [os.path.join(tool.host.hooks, script), guest.name, "release", "end", "from snapshot"]
    subprocess.run(call, input=guest.domain.XMLDesc().encode(), check=True)
    assert noted(tool, guest) == ["reverted"]
    (disk,) = tool.backup(guest)["disks"]
    assert disk["mode"] == "full" and "the guest was put back to a snapshot at" in disk["reason"]
    assert modes(tool, guest) == {"vda": "incremental"}
    same(tool.restored(guest, "latest", str(tmp_path)), models(guest))


def test_a_busy_guest_has_to_wait(tool: Tool, plain_guest: Callable[..., Guest]) -> None:
    guest = plain_guest(plain.Disk("vda"), name="busy")
    tool.backup(guest)
    guest.destroy()
    guest.start()
    folder = os.path.join(guest.folder, "job")
    os.mkdir(folder)
    os.chmod(folder, 0o777)  # QEMU is another user
    document = (
        f"<domainbackup mode='pull'><server transport='unix' socket='{folder}/s'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{folder}/scratch'/></disk></disks></domainbackup>"
    )
    guest.domain.backupBegin(document, None)
    ended = tool.run("recover", "--noted")
    assert ended.code == 11
    (one,) = ended.document["results"]
    assert one["waiting"] == 2 and "the guest is busy with a backup" in one["left"][0]
    assert noted(tool, guest) == ["started", "stopped"]
    guest.domain.abortJob()
    assert recovered(tool) == {guest.name: []}
    assert noted(tool, guest) == []


def test_whatever_is_wrong_with_the_spool_guests_start_and_the_daemon_keeps_them(
    tool: Tool, plain_guest: Callable[..., Guest]
) -> None:
    guest = plain_guest(plain.Disk("vda"), name="starts", start=False)
    tree = etree.fromstring(guest.xml())
    metadata = etree.SubElement(tree, "metadata")
    etree.SubElement(metadata, "{urn:test}big", nsmap={"t": "urn:test"}).text = "x" * 500_000
    tool.host.connection.defineXML(etree.tostring(tree, encoding="unicode"))
    guest.start()
    assert tool.run("hooks", "status", "--libvirt-directory", tool.host.hooks).document["results"][0]["events"] >= 1
    (place,) = Path(tool.host.root, "spool").iterdir()
    shutil.rmtree(place)
    guest.destroy()
    guest.start()
    tool.host.restart()  # it calls the hook for each guest that it finds, and kills the guest if the hook fails
    assert guest.running
    tool.backup(guest)
    guest.domain.managedSave()
    guest.start()
    assert guest.running
    installed(tool)
