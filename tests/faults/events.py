"""What libvirt reports of a guest while a test goes on, by virsh in a process of its own."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from typing import List

from tests.guests import domain


class Events:
    """All events of one guest; a context manager.  `seen` are virsh's lines so far."""

    def __init__(self, guest: domain.Guest) -> None:
        self._guest = guest
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed at exit

    def __enter__(self) -> Events:
        uri, uuid = self._guest.host.uri, self._guest.uuid
        self._process = subprocess.Popen(
            ["stdbuf", "-oL", "virsh", "-c", uri, "event", "--domain", uuid, "--all", "--loop", "--timestamp"],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )
        # It does not say when it listens: its connection is open then, and an event of ours would be one too many.
        time.sleep(0.5)
        assert self._process.poll() is None, self.seen()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._file.close()

    def seen(self) -> List[str]:
        self._file.seek(0)
        return self._file.read().decode(errors="replace").splitlines()

    def harm(self) -> List[str]:
        """Those that mean the guest stood still or lost a write."""
        time.sleep(0.1)
        return [line for line in self.seen() if "Suspended" in line or "io-error" in line]


class Gone:
    """Whether the guest's job has ended, found out beside the writes so that they are as fast as can be.

    The copy is held meanwhile: however fast the machine is, it does not end before.
    """

    def __init__(self, guest: domain.Guest) -> None:
        self._guest, self._gone, self._left = guest, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._left.wait(0.02):
            if not self._guest.has_job:
                self._gone.set()
                return

    def __call__(self) -> bool:
        return self._gone.is_set()

    def within(self, seconds: float) -> bool:
        return self._gone.wait(seconds)

    def __enter__(self) -> Gone:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
