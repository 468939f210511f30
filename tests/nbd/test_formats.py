"""Repositories as earlier versions wrote them, one of each format, are read, restored and built on for ever.

golden/format-N.tar.xz is one of `histories.History`: two disks, a full backup, an increment that a prune has made a
mark, a mark, one disk left out, one that grew, a full one under the same lineage.  golden/format-N.json has the BLAKE3 of
what each backup restores to, and the answer of `changed vda --since 1 --until 5`.  None is ever made anew.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, Final

import blake3
import pytest

import libvirt_cbt
from libvirt_cbt.repository import manifest
from tests.nbd.conftest import run
from tests.unit import repository_samples as samples

GOLDEN: Final = Path(__file__).with_name("golden")


def digest(path: str) -> str:
    return blake3.blake3(Path(path).read_bytes()).hexdigest()


def test_there_is_one_of_each_format() -> None:
    names = [f"format-{number}" for number in range(1, manifest.FORMAT + 1)]
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(
        f"{n}{s}" for n in names for s in (".json", ".tar.xz")
    )


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_an_older_repository(folder: str, name: str) -> None:
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # it is ours; Python 3.14 has another default
        archive.extractall(folder)
    wanted: Any = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    with libvirt_cbt.Session("test:///default", f"{folder}/repository") as session:
        assert libvirt_cbt.verify(session, samples.UUID).damage == []
        assert restored(session, folder, "before", wanted["backups"]) == wanted["backups"]
        answer = libvirt_cbt.changed(session, samples.UUID, "vda", since=1, until=5)
        assert [list(row) for page in answer for row in page.tolist()] == wanted["changed"]
        # Without this tool, too.
        kept = session.repository().domain(samples.UUID)
        newest = kept.generations()[-1]
        for target, value in wanted["backups"][str(newest.generation)].items():
            layer = f"{kept.directory(newest.id)}/{target}.qcow2"
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer, f"{folder}/{target}.raw")
            assert digest(f"{folder}/{target}.raw") == value
        # It is written to, too: the oldest full goes.
        libvirt_cbt.prune(session, samples.UUID, remove=["1"])
        left = {number: disks for number, disks in wanted["backups"].items() if number != "1"}
        assert restored(session, folder, "after", left) == left


def restored(session: libvirt_cbt.Session, folder: str, name: str, wanted: Any) -> Any:
    return {
        number: {
            file.target: digest(file.path)
            for file in libvirt_cbt.restore(
                session, samples.UUID, f"{folder}/{name}-{number}", at=number, disks=list(disks)
            ).files
        }
        for number, disks in wanted.items()
    }
