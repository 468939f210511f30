"""A domain made of restored images: from its stored XML, with its UEFI variables, under an identity of its own."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import Iterator, List, Optional, Sequence, Tuple

from libvirt_cbt import durable, errors, folders, xmldoc
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hypervisor import defining, made, tpm
from libvirt_cbt.repository import manifest, npy, store

XML = "domain.xml"
NVRAM = "nvram"  # in a generation's directory
TPM = "tpm"
MOST = 128 << 20  # bytes of either


def stored(kept: store.DomainStore, generation: manifest.Manifest, name: str) -> Optional[bytes]:
    """A further file of a generation, against its digest; None when it has no such file.  Errors: Damaged."""
    digest = generation.files.get(name)
    if digest is None:
        return None
    path = os.path.join(kept.directory(generation.id), name)
    with durable.readable(kept.repository.path, path):
        try:
            data = durable.read(path, MOST)
            if npy.file_digest(path) != digest:
                raise errors.Damaged(path=path, reason="its digest does not match the manifest")
        except ValueError as e:
            raise errors.Damaged(path=path, reason=str(e)) from None
    return data


def xml(kept: store.DomainStore, generation: manifest.Manifest) -> str:
    """The stored XML of the domain.  Errors: Damaged."""
    data = stored(kept, generation, XML)
    if data is None:
        raise errors.Damaged(path=kept.directory(generation.id), reason="it has no domain.xml")
    return data.decode("utf-8", "replace")


class Defining:
    """Checked before anything is restored: the name, the UUID and the document; `finish` then makes the domain."""

    def __init__(
        self,
        session: Session,
        kept: store.DomainStore,
        generation: manifest.Manifest,
        name: str,
        wanted: Sequence[manifest.ManifestDisk],
        *,
        same_identity: bool,
    ) -> None:
        """Errors: IdentityTaken, Usage, NoHypervisor, HypervisorError, Damaged."""
        self._session, self._kept, self._name = session, kept, name
        session.host.site.require_here("a restored domain")
        self._uuid = None if same_identity else defining.new_uuid()
        made.require_free(session.host, name, kept.uuid if same_identity else None)
        self._xml = xml(kept, generation)
        self._nvram = stored(kept, generation, NVRAM)
        self._tpm = stored(kept, generation, TPM)
        self._document(
            [results.RestoredFile(d.target, f"/{d.target}", d.capacity) for d in wanted], None, "raw"
        )  # what cannot be made into a document is told now, not hours later

    def _document(self, files: Sequence[results.RestoredFile], nvram: Optional[str], fmt: str) -> Tuple[str, List[str]]:
        images = {file.target: defining.Image(file.path, fmt) for file in files}
        return defining.document(self._xml, defining.Copy(self._name, self._uuid, images, nvram, self._tpm is not None))

    def require_free(self, folder: str) -> None:
        """Errors: TargetExists for the file of the UEFI variables; Usage for a folder that no domain can be told of."""
        xmldoc.require_path(folder)
        if self._nvram is not None and os.path.lexists(os.path.join(folder, f"{self._name}_VARS.fd")):
            raise errors.TargetExists(path=os.path.join(folder, f"{self._name}_VARS.fd"))

    def finish(
        self, files: Sequence[results.RestoredFile], folder: str, fmt: str, *, start: bool
    ) -> Tuple[results.Defined, List[str]]:
        """The domain, and what should be known of it.  Errors: HypervisorError; the images stay where they are then."""
        nvram = os.path.join(folder, f"{self._name}_VARS.fd") if self._nvram is not None else None
        if nvram and self._nvram is not None:
            try:
                durable.write_new(nvram, self._nvram)
                durable.sync_directory(folder)
            except FileExistsError:
                raise errors.TargetExists(path=nvram) from None
            except OSError as e:
                raise errors.OutputFailed(path=nvram, reason=e.strerror) from None
        document, warnings = self._document(files, nvram, fmt)
        host = self._session.host
        try:
            with self._tpm_state(warnings):
                uuid = made.define(host, document)
            if start:
                made.start(host, uuid)
        except errors.HypervisorError as e:
            raise errors.HypervisorError(reason=f"{e}; the restored images stay in {folder}") from None
        return results.Defined(self._name, uuid, start, nvram), warnings

    @contextmanager
    def _tpm_state(self, warnings: List[str]) -> Iterator[None]:
        """The state of the TPM lies where libvirt looks for it before the domain is there; gone again when that fails.

        libvirt gives it to swtpm's user when it starts the domain, and removes it when that is undefined.
        """
        path = tpm.state(self._session.host.uri, self._xml, self._uuid or self._kept.uuid)
        if self._tpm is None or path is None:
            yield
            return
        top = os.path.dirname(os.path.dirname(path))
        if os.path.lexists(top):
            warnings.append(f"a state of the emulated TPM is there already, and stays: {top}")
            yield
            return
        try:
            folders.make(os.path.dirname(top), 0o711)
            folders.make(top, 0o711)
            folders.make(os.path.dirname(path), 0o700)
            durable.write_new(path, self._tpm)
            durable.sync_directory(os.path.dirname(path))
            yield
        except BaseException as e:
            shutil.rmtree(top, ignore_errors=True)
            if isinstance(e, OSError):
                raise errors.OutputFailed(path=path, reason=e.strerror) from None
            raise
