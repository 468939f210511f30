"""The fleecing point of a guest that is off: its images, held still by a server of ours.

The new bitmap is put into each image first, then the images are opened read-only together: QEMU's locks let nobody
write from then on.  What is written in between is in the delta of this generation and in that of the next: too much,
never too little.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Dict, Final, Iterator, List, Sequence, Tuple

from libvirt_cbt import errors, machines, names
from libvirt_cbt.actions import fleecing, planning, tracking
from libvirt_cbt.actions.exports import Exported
from libvirt_cbt.actions.fleecing import Fleece, Plan, Request
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import bitmaps, connection, documents, domain, quiesce
from libvirt_cbt.nbdio import still
from libvirt_cbt.nbdio.server import Endpoint
from libvirt_cbt.repository import manifest, staging, store

ALIVE_SECONDS: Final = 5.0  # of a server to greet; it is there or it is not
ORPHAN_SECONDS: Final = 1.0  # a qemu-img whose parent was killed goes on for some milliseconds


def planned(session: Session, kept: store.DomainStore, dom: domain.Domain, request: Request) -> Plan:
    """Decides from the images what libvirt cannot say of a guest that is off; changes nothing.

    Errors: ImageInUse, ImageUnreadable; those of planning.plan.
    """
    disks: List[domain.Disk] = []
    images: Dict[str, still.Image] = {}
    machine = images_of(session.host)
    for disk in dom.disks:
        left_out = disk.target in request.exclude or bool(request.disks and disk.target not in request.disks)
        if not disk.unprotected and not ((left_out or request.mark) and disk.untracked):
            try:
                images[disk.target] = _image(machine, disk)
            except errors.ImageUnreadable as e:
                if not left_out:
                    raise
                disks.append(replace(disk, unprotected=str(e.facts["reason"])))  # it cannot join as a mark, either
                continue
        disks.append(disk)
    seen = replace(dom, disks=tuple(disks))
    found, why = _tracking(kept, images)
    plans, unprotected = planning.plan(
        seen, kept, found, partial(tracking.bitmaps, session), full=request.full, only=request.disks,
        exclude=request.exclude, mark=request.mark, allow_plaintext=request.allow_plaintext,
        max_chain=request.max_chain,
    )  # fmt: skip
    newest = next(iter(found), "")
    for at, one in enumerate(plans):
        # What is in the image and of no use is known here only; of what is not there, planning can say more.
        if one.base is None and not one.disk.untracked and newest in images[one.target].bitmaps:
            plans[at] = replace(one, reason=why.get(one.target, one.reason))
    tracked = {p.target: p.disk.source for p in plans if not p.disk.untracked}
    return fleecing.drawn(session, kept, seen, request, (plans, unprotected), tracked)


def images_of(host: connection.Host) -> machines.Machine:
    """Where the images of a host's domains are worked on.  Errors: Elsewhere."""
    return host.site.machine() or still.Here()


def unusable(host: connection.Host, kept: store.DomainStore, dom: domain.Domain) -> Dict[str, str]:
    """By target, why the newest generation's bitmap cannot be counted on; an image that cannot be read is left out."""
    images = {}
    try:
        machine = images_of(host)
    except errors.Elsewhere:
        return {}
    for disk in dom.disks:
        if not disk.unprotected and not disk.untracked:
            try:
                images[disk.target] = _image(machine, disk)
            except errors.CbtError:
                continue
    return _tracking(kept, images)[1]


def _image(machine: machines.Machine, disk: domain.Disk) -> still.Image:
    reason = None
    if disk.source_type not in ("file", "block", "volume"):
        reason = f"it is on {names.printable(disk.source_type)} storage ({names.printable(disk.source)})"
    elif disk.encrypted:
        reason = "it is encrypted, and only libvirt has the key"
    if reason:
        raise errors.ImageUnreadable(target=disk.target, reason=reason)
    return still.look(machine, disk.target, disk.source, disk.format)


def _tracking(
    kept: store.DomainStore, images: Dict[str, still.Image]
) -> Tuple[Dict[str, documents.CheckpointInfo], Dict[str, str]]:
    """The newest generation's checkpoint as the images show it, and why it is not usable where it is not.

    The bitmaps' sizes stay unknown, 0: qemu-img does not tell them.  What libvirt knows does not matter here.
    """
    history = kept.generations()
    if not history or not history[-1].checkpoint:
        return {}, {}
    newest = history[-1]
    name = str(newest.checkpoint)
    why = {}
    for target, image in images.items():
        reason = image.unusable(name)
        if reason and newest.disk(target):
            why[target] = f"the bitmap of generation {newest.generation} {reason}"
    sizes = {target: None if target in why else 0 for target in images}
    return {name: documents.CheckpointInfo(name, "", None, 0, sizes)}, why


class Still(Fleece):
    """The point of a guest that is off."""

    def __init__(self, session: Session, plan: Plan, stage: staging.Staging, rest: bitmaps.Rest) -> None:
        super().__init__(session, plan, stage)
        self.quiesced = quiesce.Quiesced(plan.request.quiesce, "none", None, rest.unclean)
        self._servers = ExitStack()
        self._endpoints: Dict[str, Endpoint] = {}
        self._machine = images_of(plan.host)

    def begin(self) -> None:
        """Errors: ImageInUse, ImageUnreadable, ToolFailed, SourceLost when the domain was changed meanwhile."""
        plan = self.plan
        for target, path in plan.intent.images.items():
            still.add(self._machine, target, path, plan.intent.checkpoint)
        images = {d.target: (_image(self._machine, d.disk), d.checkpoint) for d in plan.disks}
        self._endpoints = self._servers.enter_context(still.held(self._machine, images, plan.places.run_dir))
        # Nobody can write any more: what is seen now is what is read.
        shown = names.printable(plan.dom.name)
        self._session.watch.note(f"guest '{shown}' cannot be started until process {os.getpid()} has read its images")
        self._proved()
        self.frozen_at = fleecing.now()

    def _proved(self) -> None:
        now = domain.read(self.plan.host, self.plan.dom.uuid)
        for plan in self.plan.disks:
            was, target = plan.disk, plan.target
            found = next((d for d in now.disks if d.target == target), None)
            if found is None or (found.source, found.format, found.inodes) != (was.source, was.format, was.inodes):
                raise errors.SourceLost(target=target, reason="the domain got another image for it meanwhile")
            image = _image(self._machine, was)
            needed = [plan.checkpoint] if plan.checkpoint else []
            if target in self.plan.intent.images:
                needed.append(self.plan.intent.checkpoint)
            for name in needed:
                reason = image.unusable(name)
                if reason:
                    raise errors.SourceLost(target=target, reason=f"somebody opened its image, and bitmap {name} {reason}")

    def exported(self) -> Dict[str, Exported]:
        return {
            disk.target: Exported(
                self._endpoints[disk.target].socket, self._endpoints[disk.target].export, disk.checkpoint
            )
            for disk in self.plan.disks
        }

    def alive(self) -> bool:
        """The images are held for as long as their server lives."""
        return machines.greets(next(iter(self._endpoints.values())).socket, ALIVE_SECONDS)

    def lost(self, error: errors.CbtError) -> errors.CbtError:
        if self.alive():
            return error
        target = error.facts.get("target") or error.facts.get("export")
        return errors.SourceLost(target=target, reason="the server of its image ended")

    def let_go(self) -> None:
        """The guest is off and waits for nothing: `release` is soon enough."""

    def close(self) -> None:
        """Tells libvirt of the new checkpoint while the images are still held, then lets them go."""
        plan = self.plan
        if not self.alive():
            raise errors.SourceLost(target=plan.disks[0].target, reason="the server of its image ended before the copy did")
        if plan.checkpoint:
            bitmaps.redefine(
                plan.host, plan.dom, plan.checkpoint, plan.intent.repository, frozenset(plan.intent.images)
            )
        self.release()
        plan.host.site.remove(plan.places)  # before publication: the intent that names the folder goes with it

    def release(self) -> None:
        """Lets the images go: from now on the guest can be started."""
        with suppress(errors.ToolFailed):  # it had ended: `close` has seen that, or there is another error to tell of
            self._servers.close()


@contextmanager
def opened(session: Session, kept: store.DomainStore, plan: Plan) -> Iterator[Still]:
    """The images, held; whatever fails inside takes the new bitmaps and staging away again.

    Errors: NotConsistent, ImageInUse, ImageUnreadable, HypervisorError, RepositoryError and kin.
    """
    rest = bitmaps.rest(plan.host, plan.dom.uuid)
    if plan.request.quiesce == "agent" and not rest.known:
        raise errors.NotConsistent(
            domain=names.printable(plan.dom.name),
            reason=rest.unclean or "it is off, and libvirt does not know whether it was shut down in order",
        )
    with staging.begun(kept, plan.intent) as stage:
        point = Still(session, plan, stage, rest)
        try:
            session.watch.stop()
            plan.host.site.make(plan.places, {}, None)
            try:
                point.begin()
                yield point
            finally:
                point.release()
        except BaseException:
            if not stage.published:
                try:
                    plan.host.site.remove(plan.places)
                    withdraw(plan.host, plan.intent)
                except errors.CbtError:
                    stage.keep = True  # the guest runs by now, or the daemon does not: `recover` does it from the intent
            raise


def withdraw(host: connection.Host, intent: manifest.Intent) -> List[str]:
    """Removes the new bitmap of an unpublished generation from where its intent says it may be, and its metadata.

    The guest may run by now: then its QEMU has the images, and removes the bitmap itself.  Safe to repeat.
    Errors: ImageInUse when somebody else has an image open; HypervisorError.
    """
    uuid, name = names.DomainUuid(intent.domain.uuid), intent.checkpoint
    done: List[str] = []
    refused: Dict[str, errors.ImageInUse] = {}
    deadline = time.monotonic() + ORPHAN_SECONDS
    machine = images_of(host)
    for target, path in intent.images.items():
        try:
            if _removed(machine, target, path, name, deadline):
                done.append(f"removed bitmap {name} from {path}")
        except errors.ImageInUse as e:
            refused[target] = e
    if refused and domain.alive(host, uuid):
        gone = bitmaps.forget(host, uuid, name, intent.repository, list(refused))
        done += [f"removed bitmap {name} from disk {target}" for target in gone]
    for target, error in refused.items():
        if still.has(machine, target, intent.images[target], name, shared=True):
            raise error
    if bitmaps.drop(host, uuid, name):
        done.append(f"removed checkpoint {name}")
    return done


def _removed(machine: machines.Machine, target: str, path: str, name: str, deadline: float) -> bool:
    while True:
        try:
            return still.remove(machine, target, path, name)
        except errors.ImageInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def require_erasable(host: connection.Host, dom: domain.Domain, checkpoints: Sequence[str]) -> None:
    """That `erase` can remove each of them.  Errors: BitmapBelow, ImageUnreadable."""
    machine = images_of(host)
    for disk in _tracked(dom):
        below = {bitmap for image in _image(machine, disk).below() for bitmap in image.bitmaps}
        for checkpoint in checkpoints:
            if checkpoint in below:
                # Others may use that file, too; a running QEMU knows what it does.
                raise errors.BitmapBelow(target=disk.target, checkpoint=checkpoint)


def erase(host: connection.Host, dom: domain.Domain, checkpoint: str) -> bool:
    """Removes a checkpoint of ours of a domain that is off: its bitmaps, then its metadata; False when there was none.

    Errors: BitmapBelow before anything is removed; ImageInUse, ImageUnreadable, HypervisorError: what is left of it
    waits for another run.
    """
    require_erasable(host, dom, [checkpoint])
    machine = images_of(host)
    removed = [still.remove(machine, disk.target, disk.source, checkpoint) for disk in _tracked(dom)]
    return bitmaps.drop(host, dom.uuid, checkpoint) or any(removed)


def _tracked(dom: domain.Domain) -> List[domain.Disk]:
    return [disk for disk in dom.disks if not disk.unprotected and not disk.untracked]
