"""One era of the soak: a private libvirtd, a guest, its repositories, and what the tool has done of late."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from typing import Any, Callable, Dict, Final, Iterator, List, Optional, Set
from unittest import mock

from tests.faults import survivors
from tests.faults.test_scratch import SmallScratch
from tests.soak.calls import Calls, Ended
from tests.soak.guest import MIB, Disk, Guest
from tests.soak.model import EITHER, Chronicle, Made, Moment, layered, require

ROOM: Final = 256  # MiB of the file system of the repositories


class World:
    """A context manager; nothing of it is left at the end."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self.counts: Counter[str] = Counter()
        self.forgotten: Set[int] = set()  # QEMUs that have lost a daemon

    def __enter__(self) -> World:
        with ExitStack() as stack:
            self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cbt-soak-", dir="/tmp"))
            self.rooms = os.path.join(self.folder, "rooms")
            stack.enter_context(small_file_system(self.rooms))
            self.host = SmallScratch()
            stack.enter_context(self.host)
            stack.enter_context(mock.patch.dict(os.environ, self.host.environment()))
            self.calls = Calls(self.host)
            self.chronicles = [self._chronicle("first"), self._chronicle("second")]
            self.processes = survivors.Survivors(self.host.run_dir)
            stack.callback(self.processes.end)
            disks = [Disk("vda", 2 * MIB), Disk("vdb", MIB + 17 * 512, options=("cluster_size=512",))]
            self.guest = Guest(self.host, disks, self.chronicles)
            stack.callback(self.guest.remove)
            self.guest.define()
            self.guest.start()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _chronicle(self, name: str) -> Chronicle:
        made = Chronicle(name, os.path.join(self.rooms, name))
        require(self.calls.here(made.repository, "init").code == 0, "init failed")
        return made

    # What rules ask and do

    def choose(self, rng: random.Random) -> Chronicle:
        """Mostly the first."""
        return self.chronicles[rng.random() < 0.2]

    @property
    def point(self) -> Optional[Chronicle]:
        """Whose fleecing point is open, as far as we know."""
        return next((one for one in self.chronicles if one.point), None)

    def lose_daemon(self, how: Callable[[], None]) -> None:
        """A libvirtd that is killed while it ends a job may never tell QEMU to close that job's scratch files."""
        if self.guest.running:
            self.forgotten.add(self.guest.pid)
        how()

    @property
    def busy(self) -> bool:
        """Whether a job runs on the guest."""
        return self.guest.running and self.guest.has_job

    def command(self, chronicle: Chronicle, verb: str, *arguments: str, **trouble: Any) -> Ended:
        """In a process of its own when something is to happen to it."""
        if trouble:
            return self.calls.process(chronicle.repository, verb, self.guest.uuid, *arguments, **trouble)
        return self.calls.here(chronicle.repository, verb, self.guest.uuid, *arguments)

    def in_the_way(self, chronicle: Chronicle, ended: Ended, *, was_busy: bool) -> bool:
        """Whether a run rightly did not begin: a point was open, or another repository's job was there.

        A job that a killed run of its own has left is no excuse.
        """
        if ended.kind == "PointOpen":
            require(chronicle.point and was_busy, "a point is open that nobody opened", ended)
            return True
        if ended.kind == "DomainBusy":
            others = [one for one in self.chronicles if one is not chronicle and (one.point or one.killed)]
            require(others and was_busy, "a job is in the way that nobody began", ended)
            return True
        sure = [one for one in self.chronicles if one.point and not one.point.doubtful]
        require(not (sure and was_busy), "an open point did not keep a run out", ended)
        return False

    def moment(self, chronicle: Chronicle) -> Moment:
        """Now, as a run may make it a generation."""
        if not self.guest.running:
            for target in self.guest.disks:
                disk = self.guest.disk(target)
                if disk.below:  # its bitmap may be in two images, and only a running QEMU shows both as one
                    chronicle.broke(disk.key, EITHER)
        return chronicle.moment(self.guest.views())

    def published(self, chronicle: Chronicle, moment: Moment) -> Optional[Made]:
        """What a run has published of this moment, if it has; whatever was there before is there still, as it was.

        A run may also have committed the point that a killed one had begun to commit.
        """
        rows = self.listed(chronicle)
        known = list(chronicle.made)
        require([r["id"] for r in rows[: len(known)]] == [m.id for m in known], "a generation is gone", rows)
        for made, row in zip(known, rows):
            require(layered(row) == made.layered, "a generation holds other disks than before", row)
        new = rows[len(known) :]
        if new and chronicle.point and new[0]["id"] == chronicle.point.id:
            point, chronicle.point = chronicle.point, None
            committed = chronicle.publish(point.moment, new.pop(0))
            if point.moment is moment:
                require(not new, "more than one generation at once", rows)
                return committed
        require(len(new) <= 1, "more than one generation at once", rows)
        if not new:
            return None
        chronicle.point = None
        return chronicle.publish(moment, new[0])

    def settled(self, chronicle: Chronicle) -> None:
        """A run has put right what others left, and published nothing but a point that was to be committed."""
        require(self.published(chronicle, self.moment(chronicle)) is None, "a generation out of nothing")
        chronicle.point, chronicle.killed = None, False

    def staged(self, chronicle: Chronicle) -> List[str]:
        """Ids of what lies in staging: what an open point will be, or what a killed run has left."""
        place = os.path.join(chronicle.repository, self.guest.uuid, "staging")
        return sorted(os.listdir(place)) if os.path.isdir(place) else []

    def listed(self, chronicle: Chronicle) -> List[Dict[str, Any]]:
        """The tool's list, ascending."""
        ended = self.command(chronicle, "list")
        return [] if ended.kind == "NotInRepository" else list(ended.result["generations"])


@contextlib.contextmanager
def small_file_system(path: str) -> Iterator[None]:
    """For the repositories: it can be filled."""
    os.makedirs(path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}m,mode=0700", "cbt-soak", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)
