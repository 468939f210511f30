"""The journal of a restore in place lies beside the images, where others may be able to write: it names no other file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from libvirt_cbt.actions import in_place

UUID = "12345678-1234-1234-1234-123456789abc"


def images(folder: Path) -> str:
    """An image with its new content beside it; the image."""
    (folder / "vda.qcow2").write_bytes(b"old")
    (folder / ("vda.qcow2" + in_place.NEW)).write_bytes(b"new")
    return str(folder / "vda.qcow2")


def journal(folder: Path, content: Any) -> str:
    path = folder / ("vda.qcow2" + in_place.JOURNAL)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def test_the_images_of_the_domain_are_exchanged(tmp_path: Path) -> None:
    image = images(tmp_path)
    assert in_place._rename(journal(tmp_path, {"domain": UUID, "images": [image]}), UUID, [image]) == [image]
    assert Path(image).read_bytes() == b"new" and Path(image + in_place.OLD).read_bytes() == b"old"


def test_no_other_file_is(tmp_path: Path) -> None:
    image = images(tmp_path)
    (tmp_path / "else").mkdir()
    other = images(tmp_path / "else")
    with pytest.raises(OSError, match="no disk of the domain"):
        in_place._rename(journal(tmp_path, {"domain": UUID, "images": [image, other]}), UUID, [image])
    assert Path(image).read_bytes() == Path(other).read_bytes() == b"old"
    assert not os.path.lexists(other + in_place.OLD)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[" * 100000, b"5", {}, {"domain": UUID}, {"domain": UUID, "images": 5}, {"domain": "x", "images": []}],
    ids=range(8),
)
def test_what_is_no_journal(tmp_path: Path, content: Any) -> None:
    image = images(tmp_path)
    with pytest.raises(OSError, match="it is no journal of this domain"):
        in_place._rename(journal(tmp_path, content), UUID, [image])
    assert Path(image).read_bytes() == b"old"
