"""A run in flight: staging/<id>/, and the one rename that makes it a backup."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, ContextManager, Dict, Iterator, List, Optional

import numpy as np

from libvirt_cbt import durable, extents, processes
from libvirt_cbt.repository import npy
from libvirt_cbt.repository.manifest import Guard, Intent, Layers, Manifest, Phase
from libvirt_cbt.repository.store import DomainStore


class Staging:
    """Files of a generation before it is published.  Made by `begun`, or anew for a point that was left open."""

    def __init__(self, kept: DomainStore, intent: Intent) -> None:
        self._kept, self.intent = kept, intent
        self.path = os.path.join(kept.path, "staging", intent.id)
        self.published = False
        self.keep = False  # what the run left outside could not be removed: the intent stays for `recover`
        self._writers: Dict[str, npy.Writer] = {}
        self._layers: Dict[str, int] = {}
        self._begun: List[int] = []

    def advance(
        self,
        phase: Phase,
        guard: Optional[processes.Process] = None,
        *,
        thaw_owed: Optional[bool] = None,
        durably: bool = True,
    ) -> None:
        """Says durably what comes next, before it is done, and which process guards it; None leaves it as it was.

        Not `durably`, where the phase before it owes no less: a power cut may leave that.
        """
        changes: Dict[str, Any] = {"phase": phase}
        if guard:
            changes["guard"] = Guard(pid=guard.pid, started=guard.started)
        if thaw_owed is not None:
            changes["thaw_owed"] = thaw_owed
        self.intent = self.intent.model_copy(update=changes)
        with self._explained():
            path = os.path.join(self.path, "intent.json")
            durable.replace(path, self.intent.dump(), durably=durably)

    def layer(self, target: str) -> str:
        return os.path.join(self.path, f"{target}.qcow2")

    def opened(self, target: str) -> int:
        """A descriptor of a layer that is there and that others will write; it is open until it was synced.

        What the disk did not take is surely told to those who had the file open when it was written: fsync(2).
        """
        path = self.layer(target)
        with self._explained():
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._layers[os.path.basename(path)] = fd
        return fd

    def deltas(self, target: str) -> npy.Writer:
        return self._writer(f"{target}.delta.npy", extents.EXTENT)

    def contents(self, target: str) -> npy.Writer:
        return self._writer(f"{target}.contents.npy", extents.CONTENT)

    def _writer(self, name: str, dtype: np.dtype[Any]) -> npy.Writer:
        with self._explained():
            writer = npy.Writer(os.path.join(self.path, name), dtype)
        self._writers[name] = writer
        return writer

    def add(self, name: str, data: bytes) -> str:
        """A further file of the generation, synced with the rest; gives its digest."""
        path = os.path.join(self.path, name)
        with self._explained():
            self._begun.append(durable.begin_new(path, data))
        return npy.file_digest(path)

    def publish(self, manifest: Manifest, layers: Layers) -> None:
        """Steps 7 and 8 of the write order: everything durable in staging, then the rename that publishes it."""
        self.complete(manifest, layers)
        self.commit()

    def complete(self, manifest: Manifest, layers: Layers) -> None:
        """All of the generation is durable in staging, and still unpublished."""
        with self._explained():
            for entry in layers.disks.values():
                path = os.path.join(self.path, entry.file)
                os.chmod(path, durable.FILE_MODE)
                if entry.file in self._layers:
                    os.fsync(self._layers[entry.file])
                else:
                    durable.sync_file(path)
            for name, document in (("layers.json", layers), ("manifest.json", manifest)):
                self._begun.append(durable.begin_new(os.path.join(self.path, name), document.dump()))
            for fd in self._begun:
                os.fsync(fd)
            durable.sync_directory(self.path)

    def commit(self) -> None:
        """The rename.  After it the generation is published whatever happens."""
        place = self._kept.directory(self.intent.id)
        with self._explained():
            # The intent is published with the rest and removed then: without it a crash just before the rename
            # would leave a checkpoint that nothing proves to be ours.  A power cut may bring it back: it means nothing.
            durable.publish(self.path, place, done=self._seen)
            os.unlink(os.path.join(place, "intent.json"))

    def _seen(self) -> None:
        self.published = True
        self._kept.grown(self.intent.id)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        for fd in (*self._layers.values(), *self._begun):
            os.close(fd)
        self._layers.clear()
        self._begun.clear()

    def _explained(self) -> ContextManager[None]:
        return durable.explained(self._kept.repository.path, self.path)


@contextmanager
def begun(kept: DomainStore, intent: Intent) -> Iterator[Staging]:
    """Makes staging/<id> with its intent, durably; removes it at the end unless it was published or must be kept."""
    staging = Staging(kept, intent)
    try:
        with durable.explained(kept.repository.path, staging.path):
            durable.make_directory(staging.path)
            durable.write_new(os.path.join(staging.path, "intent.json"), intent.dump())
            durable.sync_directory(staging.path)
        yield staging
    finally:
        staging.close()
        if not staging.published and not staging.keep and os.path.isdir(staging.path):
            try:
                durable.remove_directory(staging.path, last="intent.json")
            except OSError:
                pass  # `recover` removes it; what ended the run is the error to be told of
