"""Trap A in both directions: a reply may tell less of any context, and each of them may be the shorter one.

QEMU does either (131072 extents per context): fragmented data cuts base:allocation,
scattered dirty bits over solid data cut the bitmap.  The second takes a minute to
build, so here true replies are cut, as the protocol allows.
"""

from __future__ import annotations

import random
from typing import Any, Dict, List

import pytest

from libvirt_cbt.nbdio import blockstatus, client
from tests.nbd.conftest import MIB, Chain, Disk

SIZE = 2 * MIB + 512


def shortened(flat: List[int], rng: random.Random) -> List[int]:
    """At most an eighth of the extents, the last perhaps in part; never nothing, so that there is progress."""
    kept = flat[: 2 * rng.randrange(1, len(flat) // 16 + 2)]
    sectors = kept[-2] // 512
    return [*kept[:-2], 512 * rng.randrange(1, sectors + 1), kept[-1]] if sectors else kept


@pytest.mark.fault(30)
@pytest.mark.parametrize("shorter", ["allocation", "bitmap", "either"])
def test_a_context_that_tells_less_loses_nothing(
    folder: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch, shorter: str
) -> None:
    whole = client.Connection.block_status
    replies: List[int] = []

    def block_status(self: client.Connection, length: int, offset: int, done: Any) -> None:
        def cut(error: int, found: Dict[str, List[int]]) -> None:
            replies.append(offset)
            for context in sorted(found):
                kind = "allocation" if context == blockstatus.ALLOCATION else "bitmap"
                if shorter in (kind, "either"):
                    found[context] = shortened(found[context], rng)
            done(error, found)

        whole(self, length, offset, cut)

    disk, chain = Disk(folder, SIZE, cluster=512, granularity=512), Chain(folder)
    disk.fill(b"".join(bytes([rng.choice((0, 0x11))]) * 512 for _ in range(SIZE // 512)))
    with disk.export() as source:
        chain.backup(source, disk.model, None)
    disk.next_bitmap()
    # A mark on every grain, and zeroes over data: whatever reply is cut there is something behind the cut.
    places = sorted(rng.sample(range(SIZE // 512), 120)) + [g * 128 for g in range(SIZE // 65536)]
    disk.write(*((rng.choice(("write", "zero")), 512 * place, 512, 0x22) for place in places))
    monkeypatch.setattr(client.Connection, "block_status", block_status)
    with disk.export() as source:
        chain.backup(source, disk.model, disk.bitmap)
    assert len(replies) > 1, "nothing was cut"
    chain.prove()
