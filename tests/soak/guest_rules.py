"""What the guest does, and what is done to it and to its host."""

from __future__ import annotations

import random
from typing import Final, List, Optional

import libvirt

from tests.faults.lineages import METADATA
from tests.soak.guest import GROWN, MIB, OFF, RUNNING, SAVED, SMALL, Disk
from tests.soak.model import SECTOR
from tests.soak.rules import rule
from tests.soak.world import World

DISKS: Final = 4
CLUSTERS: Final = (
    ("cluster_size=512",),
    ("cluster_size=4k",),
    ("cluster_size=64k",),
    ("cluster_size=2M",),
    ("cluster_size=128k", "extended_l2=on"),
)


@rule(24)
def write(world: World, rng: random.Random) -> Optional[str]:
    """Writes, zeroes and discards of the guest's."""
    guest = world.guest
    if guest.state == SAVED:
        return None
    done = []
    for _ in range(rng.randint(1, 3)):
        target = rng.choice(sorted(guest.disks))
        number = rng.randint(1, 4)
        if guest.state == OFF:
            offset = SECTOR * rng.randrange(guest.disks[target].size // SECTOR)
            length = min(SECTOR * rng.choice((1, 8, 129)), guest.disks[target].size - offset)
            guest.write_while_off(target, offset, length, rng.randint(1, 255))
            number = 1
        else:
            guest.random_writes(rng, target, number, discards=not world.busy)
        done.append(f"{target} {number}")
    return ", ".join(done)


@rule(4)
def power(world: World, rng: random.Random) -> Optional[str]:
    """On or off, or both."""
    guest = world.guest
    was = guest.state
    if was != RUNNING:
        guest.start()
        return f"on, was {was}"
    guest.destroy()
    if rng.random() < 0.4:
        return "off"
    guest.start()
    return "off and on"


@rule(5)
def switch_on(world: World, rng: random.Random) -> Optional[str]:
    """Guests run, mostly."""
    if world.guest.state == RUNNING:
        return None
    world.guest.start()
    return "on"


@rule(2)
def kill_qemu(world: World, rng: random.Random) -> Optional[str]:
    """As a power cut of the host would."""
    if world.guest.state != RUNNING:
        return None
    if rng.random() < 0.3:
        for target in world.guest.disks:
            world.guest.flush(target)
    world.guest.kill()
    return "killed"


@rule(3)
def save(world: World, rng: random.Random) -> Optional[str]:
    """Managed save."""
    if world.guest.state != RUNNING or world.busy:
        return None
    world.guest.save()
    if rng.random() < 0.4:
        return "saved"
    world.guest.start()
    return "saved and restored"


@rule(3)
def restart_libvirtd(world: World, rng: random.Random) -> Optional[str]:
    how = rng.choice((world.host.stop, world.host.kill))
    world.lose_daemon(how)
    world.host.start()
    if world.guest.running:
        world.guest.hmp("info status")  # waits for the daemon's reconnection, in the midst of which destroy fails
    return how.__name__


@rule(3)
def resize(world: World, rng: random.Random) -> Optional[str]:
    guest = world.guest
    target = rng.choice(sorted(guest.disks))
    grows = rng.random() < 0.7
    by = SECTOR * rng.choice((1, 127, 128, 640, rng.randint(1, 2000)))
    size = guest.disks[target].size + (by if grows else -by)
    if guest.state == SAVED or world.busy or not SMALL <= size <= GROWN or guest.disk(target).below:
        return None
    if guest.state == OFF and guest.lost_bitmaps(target):
        return None
    if grows and not all(one.may_grow(guest.disk(target).key) for one in guest.told):
        return None
    try:
        (guest.grow if grows else guest.shrink)(target, size)
    except libvirt.libvirtError as e:
        if "is inconsistent" not in str(e):  # a bitmap that a dead QEMU had open, which the next backup removes
            raise
        return f"{target}: {e}"
    return f"{target} to {size}"


def _free(world: World) -> List[str]:
    return [f"vd{letter}" for letter in "abcdef" if f"vd{letter}" not in world.guest.disks]


@rule(2)
def plug(world: World, rng: random.Random) -> Optional[str]:
    """A new disk, or one that was unplugged, under its old target or another."""
    guest = world.guest
    if guest.state == SAVED or len(guest.disks) >= DISKS:
        return None
    target = rng.choice(_free(world)[:3])
    old = rng.choice([*guest.unplugged, None])
    if old:
        guest.plug_again(old, old.target if old.target in _free(world) and rng.random() < 0.7 else target)
        return f"{old.key} again as {old.target}"
    size = SECTOR * rng.randint(1, 3 * MIB // SECTOR)
    fmt = "raw" if rng.random() < 0.2 else "qcow2"
    options = rng.choice(CLUSTERS) if fmt == "qcow2" else ()
    new = Disk(target, size, fmt, options, path=guest.new_path(target, "new"))  # one that was unplugged has the usual one
    new.create()
    guest.attach(new)
    return f"{fmt} {target} {size} {''.join(options)}"


@rule(2)
def unplug(world: World, rng: random.Random) -> Optional[str]:
    """A guest without an OS lets go of a disk only when it is off."""
    guest = world.guest
    if guest.state != OFF or len(guest.disks) < 2:
        return None
    target = rng.choice(sorted(guest.disks))
    guest.unplug(target)
    return target


@rule(3)
def snapshot(world: World, rng: random.Random) -> Optional[str]:
    guest = world.guest
    fit = [t for t in guest.tracked() if len(guest.disk(t).below) < 3]
    if guest.state != RUNNING or world.busy or not fit:
        return None
    chosen = sorted(rng.sample(fit, rng.randint(1, len(fit))))
    guest.snapshot(chosen)
    return ", ".join(chosen)


@rule(5)
def flatten(world: World, rng: random.Random) -> Optional[str]:
    """Overlays are committed, pulled or copied away."""
    guest = world.guest
    fit = [t for t in guest.tracked() if guest.disk(t).below]
    if guest.state != RUNNING or world.busy or not fit:
        return None
    target, how = rng.choice(fit), rng.choice(("commit", "commit", "pull", "copy"))
    getattr(guest, how)(target)
    return f"{how} {target}"


@rule(2)
def lose_metadata(world: World, rng: random.Random) -> Optional[str]:
    """libvirt forgets our checkpoints; the images have the bitmaps."""
    if world.busy:
        return None
    found = world.guest.domain.listAllCheckpoints()
    for checkpoint in found:
        checkpoint.delete(METADATA)
    return f"{len(found)} checkpoints" if found else None
