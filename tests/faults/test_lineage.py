"""Rows 9 to 14 of the faults: what may break tracking ends in an increment that is right, or in a new lineage with its reason."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Callable

import libvirt
import pytest
from lxml import etree

from tests.faults import lineages
from tests.faults.lineages import Kept, block_copy, pivot, two, wait_for
from tests.guests import daemon
from tests.guests.plain import MIB, PlainGuest
from tests.libvirt.tool import Tool


@pytest.fixture
def keep(
    libvirtd: daemon.Daemon, plain_guest: Callable[..., PlainGuest], tmp_path: Path, rng: random.Random
) -> Callable[..., Kept]:
    return lineages.maker(libvirtd, plain_guest, tmp_path, rng)


# 9: metadata lost


@pytest.mark.fault(9)
def test_lost_metadata_comes_back_from_the_manifest(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    kept.lose_metadata()
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
    assert "libvirt had lost checkpoint" in kept.said
    assert "disks vda, vdb" in kept.said
    kept.write()
    kept.lose_metadata()
    marked = kept.tool.run("mark", kept.guest.name, "--scratch-dir", kept.tool.host.scratch).result
    assert all(d["dirty_bytes"] < MIB for d in marked["disks"])
    kept.write()
    kept.lose_metadata()
    kept.tool.run("start", kept.guest.name, "--scratch-dir", kept.tool.host.scratch).result  # noqa: B018
    assert kept.tool.run("stop", kept.guest.name).result["committed"]
    kept.unbroken("vda", 1, 4)
    kept.unbroken("vdb", 1, 4)


@pytest.mark.fault(9)
def test_what_comes_back_is_what_was(keep: Callable[..., Kept]) -> None:
    kept = keep()
    was = etree.fromstring(kept.guest.domain.listAllCheckpoints()[0].getXMLDesc(0))
    kept.lose_metadata()
    # Ends after the plan: nothing has changed but what was put right.
    ended = kept.tool.run("backup", kept.guest.name, "--quiesce", "agent")
    assert ended.code == 17
    now = etree.fromstring(kept.guest.domain.listAllCheckpoints()[0].getXMLDesc(0))
    assert [now.findtext(tag) for tag in ("name", "description")] == [was.findtext(t) for t in ("name", "description")]
    assert abs(int(str(now.findtext("creationTime"))) - int(str(was.findtext("creationTime")))) <= 2
    rows = [[dict(d.attrib) for d in root.iterfind("disks/disk")] for root in (was, now)]
    assert rows[0] == rows[1]


@pytest.mark.fault(9)
def test_lost_metadata_files_and_a_restart_of_the_daemon(keep: Callable[..., Kept], libvirtd: daemon.Daemon) -> None:
    kept = keep()
    folder = libvirtd.inside(f"/var/lib/libvirt/qemu/checkpoint/{kept.guest.name}")
    if not libvirtd.privileged:
        folder = os.path.join(libvirtd.root, f"xdg/config/libvirt/qemu/checkpoint/{kept.guest.name}")
    shutil.rmtree(folder)
    libvirtd.restart()
    assert kept.checkpoints() == []
    assert kept.modes() == {"vda": "incremental"}


@pytest.mark.fault(9, 10)
def test_metadata_lost_and_the_bitmap_of_one_disk_too(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    (name,) = kept.checkpoints()
    kept.lose_metadata()
    kept.guest.destroy()
    remove_bitmap(kept.guest, "vdb", name)
    kept.guest.start()
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "incremental", "vdb": "full"}
    assert "bitmap of generation 1 is missing or broken" in made["vdb"]["reason"]
    kept.unbroken("vda", 1, 2)
    kept.broken("vdb", 1, 2, "missing or broken")


@pytest.mark.fault(9)
def test_metadata_lost_and_every_bitmap_broken(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    kept.guest.destroy()
    kept.guest.start()  # now the bitmap is in the images, and marked as open
    for target in kept.guest.disks:
        kept.guest.flush(target)
    kept.lose_metadata()
    kept.guest.kill()
    kept.guest.start()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "full", "vdb": "full"}
    assert all("libvirt no longer has checkpoint cbt-" in d["reason"] for d in made.values())


@pytest.mark.fault(9)
def test_a_run_killed_before_it_retired_and_then_all_metadata_lost(keep: Callable[..., Kept]) -> None:
    kept = keep()
    (older,) = kept.checkpoints()
    kept.backup()
    kept.guest.domain.checkpointCreateXML(f"<domaincheckpoint><name>{older}</name></domaincheckpoint>")
    kept.lose_metadata()
    kept.write()
    assert kept.modes() == {"vda": "incremental"}
    assert f"removed bitmap {older} of generation 1" in kept.said


@pytest.mark.fault(9)
def test_lost_metadata_of_a_guest_that_is_off(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    kept.guest.destroy()
    kept.lose_metadata()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
    assert "libvirt had lost checkpoint" in kept.said
    kept.guest.start()
    assert len(kept.checkpoints()) == 1
    assert not kept.orphans()
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


# 10: metadata there, bitmap gone


def remove_bitmap(guest: PlainGuest, target: str, name: str) -> None:
    subprocess.run(["qemu-img", "bitmap", "--remove", "-f", "qcow2", guest.disks[target].path, name], check=True)


@pytest.mark.fault(10)
def test_a_bitmap_that_is_gone_breaks_one_disk_only(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    (name,) = kept.checkpoints()
    kept.guest.destroy()
    remove_bitmap(kept.guest, "vda", name)
    kept.guest.start()
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "full", "vdb": "incremental"}
    assert kept.guest.disks["vda"].path in made["vda"]["reason"]
    kept.broken("vda", 1, 2, "bitmap of generation 1 is missing or broken")
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


@pytest.mark.fault(10)
def test_after_untrack_a_new_lineage_begins(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    assert len(kept.tool.run("untrack", kept.guest.name).result["removed"]) == 1
    assert not kept.orphans()
    kept.write()
    made = kept.backup()
    assert {t: d["mode"] for t, d in made.items()} == {"vda": "full", "vdb": "full"}
    for target in made:
        kept.broken(target, 1, 2, "libvirt no longer has checkpoint cbt-.* of generation 1, nor does .* hold")
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


# 11: the image, or the repository, put back from an older copy


@pytest.mark.fault(11)
@pytest.mark.parametrize("metadata", ["kept", "lost"])
def test_an_image_rolled_back_to_an_older_copy(keep: Callable[..., Kept], metadata: str) -> None:
    kept = keep()
    disk = kept.guest.disks["vda"]
    kept.guest.destroy()
    shutil.copyfile(disk.path, f"{disk.path}.old")
    model = bytes(disk.model)
    kept.guest.start()
    for _ in range(2):
        kept.write()
        kept.backup()
    kept.guest.destroy()
    shutil.copyfile(f"{disk.path}.old", disk.path)
    disk.model[:] = model
    kept.guest.start()
    if metadata == "lost":
        kept.lose_metadata()
    kept.write()
    made = kept.backup(orphans=1)["vda"]
    assert made["mode"] == "full"
    assert "it has that of generation 1: an older copy of the image was put back" in made["reason"]
    kept.broken("vda", 3, 4, "generation 3.* generation 1")
    kept.write()
    # The bitmap that the copy brought with it would record for ever.
    assert kept.modes(orphans=0) == {"vda": "incremental"}
    assert "removed the bitmap of generation 1 from disk vda" in kept.said


@pytest.mark.fault(11)
def test_a_copy_as_old_as_the_newest_generation_still_knows_what_it_missed(keep: Callable[..., Kept]) -> None:
    kept = keep()
    disk = kept.guest.disks["vda"]
    kept.guest.destroy()
    shutil.copyfile(disk.path, f"{disk.path}.old")
    model = bytes(disk.model)
    kept.guest.start()
    kept.write()
    kept.guest.destroy()
    shutil.copyfile(f"{disk.path}.old", disk.path)
    disk.model[:] = model
    kept.guest.start()
    assert kept.modes() == {"vda": "incremental"}


@pytest.mark.fault(11, 48)
def test_a_repository_put_back_from_an_older_copy(keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep()
    repository = kept.tool.repository
    shutil.copytree(repository, tmp_path / "old")
    for _ in range(2):
        kept.write()
        later = kept.backup()["vda"]["change_id"]
    shutil.rmtree(repository)
    shutil.move(str(tmp_path / "old"), repository)
    seen = {c["name"]: c for c in kept.tool.run("doctor", kept.guest.name).result["checks"]}
    assert seen["checkpoints"]["status"] == "warning"
    assert "untrack" in seen["checkpoints"]["detail"]
    kept.write()
    made = kept.backup(checkpoints=2)["vda"]
    assert made["mode"] == "full"
    assert "libvirt no longer has checkpoint" in made["reason"]
    assert "libvirt-cbt untrack" in kept.said
    kept.broken("vda", 1, 2, "no longer has checkpoint")
    kept.write()
    kept.backup(checkpoints=2)
    # Generation 3 is there again, and another moment than the one that somebody has the change id of.
    ended = kept.tool.run("changed", kept.guest.name, "vda", "--since", later)
    assert (ended.code, ended.document["error"]["kind"]) == (12, "ChangeIdBroken")
    assert "generation 3 is backup" in ended.stderr
    assert len(kept.tool.run("untrack", kept.guest.name).result["removed"]) == 2
    kept.write()
    assert kept.modes() == {"vda": "full"}


@pytest.mark.fault(11)
def test_two_repositories_back_up_the_same_guest_in_turn(
    keep: Callable[..., Kept], libvirtd: daemon.Daemon, tmp_path: Path, rng: random.Random
) -> None:
    kept = keep()
    other = Kept(Tool(libvirtd, str(tmp_path / "other")), kept.guest, tmp_path, rng)
    assert other.modes(checkpoints=2) == {"vda": "full"}
    for one in (kept, other, other, kept):
        one.write()
        assert one.modes(checkpoints=2) == {"vda": "incremental"}
    kept.lose_metadata()  # of both
    kept.write()
    assert kept.modes(orphans=1) == {"vda": "incremental"}
    assert other.modes(checkpoints=2) == {"vda": "incremental"}
    assert len(other.tool.run("untrack", kept.guest.name).result["removed"]) == 1
    kept.write()
    assert kept.modes() == {"vda": "incremental"}


# 12: the block layer's own work


def snapshot(guest: PlainGuest, target: str = "vda") -> str:
    """An external snapshot: the disk goes on in a new file."""
    path = f"{guest.disks[target].path}.overlay-{time.monotonic_ns()}"
    rows = "".join(
        f"<disk name='{t}' snapshot='external'><source file='{path}'/></disk>"
        if t == target
        else f"<disk name='{t}' snapshot='no'/>"
        for t in guest.disks
    )
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    guest.domain.snapshotCreateXML(f"<domainsnapshot><disks>{rows}</disks></domainsnapshot>", flags)
    return path


def commit(guest: PlainGuest, target: str = "vda") -> None:
    guest.domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    pivot(guest, target)


def _commit(kept: Kept) -> None:
    snapshot(kept.guest)
    kept.write()
    commit(kept.guest)


def _commit_with_a_generation_between(kept: Kept) -> None:
    snapshot(kept.guest)
    kept.write()
    assert kept.modes() == {"vda": "incremental"}
    kept.write()
    commit(kept.guest)


def _copy(kept: Kept) -> None:
    block_copy(kept.guest, "vda")


def _pull(kept: Kept) -> None:
    snapshot(kept.guest)
    kept.write()
    kept.guest.domain.blockPull("vda", 0, 0)
    wait_for(lambda: not kept.guest.domain.blockJobInfo("vda", 0))


def _managed_save(kept: Kept) -> None:
    kept.guest.domain.managedSave(0)
    kept.guest.start()


def _save_and_restore(kept: Kept) -> None:
    path = os.path.join(kept.guest.folder, "state")
    kept.guest.domain.save(path)
    kept.guest.host.connection.restore(path)


def _offline_commit(kept: Kept) -> None:
    """An overlay that only qemu-img knows: made, written through and committed while libvirt looks away."""
    kept.guest.destroy()
    path = kept.guest.disks["vda"].path
    over = f"{path}.over"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, over], check=True)
    write_offline(kept, over)
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", over], check=True)
    kept.guest.start()


def _offline_write(kept: Kept) -> None:
    kept.guest.destroy()
    write_offline(kept, kept.guest.disks["vda"].path)
    kept.guest.start()


def write_offline(kept: Kept, path: str) -> None:
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 70k 3k", path], check=True, stdout=subprocess.DEVNULL
    )
    kept.guest.disks["vda"].model[70 * 1024 : 73 * 1024] = b"\x5a" * 3072


@pytest.mark.fault(12, 14)
@pytest.mark.parametrize(
    "work",
    [
        _commit, _commit_with_a_generation_between, _copy, _pull, _managed_save, _save_and_restore,
        _offline_commit, _offline_write,
    ],
)  # fmt: skip
def test_increments_stay_right_over(keep: Callable[..., Kept], work: Callable[[Kept], None]) -> None:
    kept = keep()
    work(kept)
    kept.write()
    assert kept.modes() == {"vda": "incremental"}


@pytest.mark.fault(12)
def test_an_overlay_that_only_qemu_img_made_has_no_bitmap(keep: Callable[..., Kept]) -> None:
    kept = keep()
    kept.guest.destroy()
    disk = kept.guest.disks["vda"]
    base, disk.path = disk.path, f"{disk.path}.over"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, disk.path], check=True)
    kept.guest.define()
    kept.guest.start()
    kept.write()
    made = kept.backup()["vda"]
    assert made["mode"] == "full"
    assert f"missing or broken in {disk.path} (the disk was {base} then)" in made["reason"]
    kept.broken("vda", 1, 2, "missing or broken")


@pytest.mark.fault(12)
def test_a_snapshot_of_one_disk_of_two_and_its_commit(keep: Callable[..., Kept]) -> None:
    kept = keep(*two())
    snapshot(kept.guest, "vdb")
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
    kept.write()
    commit(kept.guest, "vdb")
    kept.write()
    assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}


# 13: internal snapshots


@pytest.mark.fault(13)
def test_reverts_are_refused_while_our_bitmaps_are_there(keep: Callable[..., Kept]) -> None:
    kept = keep()
    guest = kept.guest
    path = guest.disks["vda"].path
    guest.domain.snapshotCreateXML("<domainsnapshot><name>live</name></domainsnapshot>")
    guest.destroy()
    subprocess.run(["qemu-img", "snapshot", "-c", "off", path], check=True)
    guest.start()
    kept.write()
    assert kept.modes() == {"vda": "incremental"}
    kept.write()
    guest.destroy()
    for name in ("off", "live"):
        assert "Device has active dirty bitmaps" in revert_offline(path, name)
    guest.start()
    with pytest.raises(libvirt.libvirtError, match="active dirty bitmaps"):
        guest.domain.revertToSnapshot(guest.domain.snapshotLookupByName("live"))
    if not guest.running:
        guest.start()
    guest.check()  # nothing was reverted
    kept.write()
    kept.backup()  # libvirt has ended the guest over it: an increment or not, it is right
    guest.destroy()
    guest.start()
    guest.kill()
    assert "Device has active dirty bitmaps" in revert_offline(path, "off")  # nor with a bitmap that was not closed


@pytest.mark.fault(1, 13)
def test_an_image_that_lost_its_bitmap_can_be_reverted_and_is_full(keep: Callable[..., Kept]) -> None:
    kept = keep(first=False)
    guest = kept.guest
    path = guest.disks["vda"].path
    guest.destroy()
    subprocess.run(["qemu-img", "snapshot", "-c", "off", path], check=True)
    model = bytes(guest.disks["vda"].model)
    guest.start()
    kept.backup()
    kept.write()
    guest.kill()  # the bitmap was never in the image yet
    assert revert_offline(path, "off") == ""
    guest.disks["vda"].model[:] = model
    guest.start()
    assert kept.modes() == {"vda": "full"}
    kept.broken("vda", 1, 2, "missing or broken")


def revert_offline(path: str, name: str) -> str:
    """What qemu-img said against it."""
    argv = ["qemu-img", "snapshot", "-a", name, path]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stderr


@pytest.mark.fault(13)
def test_a_revert_after_untrack_begins_a_new_lineage(keep: Callable[..., Kept]) -> None:
    kept = keep()
    guest = kept.guest
    guest.domain.snapshotCreateXML("<domainsnapshot><name>live</name></domainsnapshot>")
    model = bytes(guest.disks["vda"].model)
    kept.write()
    kept.tool.run("untrack", guest.name).result  # noqa: B018
    guest.domain.revertToSnapshot(guest.domain.snapshotLookupByName("live"))
    guest.disks["vda"].model[:] = model
    made = kept.backup()["vda"]
    assert made["mode"] == "full"
    kept.broken("vda", 1, 2, "no longer has checkpoint")


# 14: migration


class _OtherHost(daemon.Daemon):
    """A second daemon that passes for another host."""

    def _configuration(self) -> str:
        path = super()._configuration()
        with open(path, "a", encoding="utf-8") as conf:
            conf.write(f'host_uuid = "{uuid.uuid4()}"\n')
        return path


@pytest.mark.fault(14)
def test_bitmaps_travel_and_their_metadata_comes_from_the_repository(
    keep: Callable[..., Kept], libvirtd: daemon.Daemon
) -> None:
    kept = keep(*two())
    guest = kept.guest

    def migrate(to: daemon.Daemon) -> None:
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNSAFE
        guest.domain.migrate3(to.connection, {libvirt.VIR_MIGRATE_PARAM_URI: "tcp:127.0.0.1"}, flags)
        guest.host = kept.tool.host = to

    with _OtherHost() as other:
        try:
            migrate(other)
            assert kept.checkpoints() == []
            kept.write()
            assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
            kept.write()
            migrate(libvirtd)  # which still has the checkpoint of generation 1, and not that of 2
            kept.write()
            assert kept.modes() == {"vda": "incremental", "vdb": "incremental"}
            kept.unbroken("vda", 1, 3)
        finally:
            if guest.host is other:
                guest.destroy()
                guest.host = libvirtd
