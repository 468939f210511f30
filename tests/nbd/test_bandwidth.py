"""`Options.bandwidth` spreads what is read over time, for all disks together, and loses none of it."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import Dict, List

import click
import pytest

from libvirt_cbt import errors, extents
from libvirt_cbt.cli import copying
from libvirt_cbt.nbdio import audit, copy, lanes, qcow2, server
from tests import patience
from tests.nbd.conftest import MIB, Chain, Disk, none_also, nothing

LIMIT = 4 * MIB


def filled(folder: str, rng: random.Random, size: int = 2 * MIB) -> Disk:
    disk = Disk(folder, size)
    disk.fill(rng.randbytes(size))
    return disk


def test_a_backup_and_its_restore_take_as_long_as_the_limit_says(folder: str, rng: random.Random) -> None:
    disk = filled(folder, rng)
    chain = Chain(folder, lanes.Options(bandwidth=LIMIT))
    least = len(disk.model) / LIMIT - lanes.BURST_SECONDS - chain.options.request_size / LIMIT
    with disk.export() as source:
        begun = time.monotonic()
        chain.backup(source, disk.model, None)
        assert time.monotonic() - begun > least
    begun = time.monotonic()
    assert chain.restore(0) == disk.model
    assert time.monotonic() - begun > least


def test_the_limit_is_for_all_disks_together_and_each_gets_its_share(folder: str, rng: random.Random) -> None:
    disks = {name: filled(folder, rng) for name in ("vda", "vdb")}
    seen: List[str] = []
    ended: Dict[str, float] = {}

    def progress(target: str, done: int, _total: int) -> None:
        seen.append(target)
        ended[target] = time.monotonic()

    with ExitStack() as stack:
        pulls = []
        for name, disk in disks.items():
            path = f"{folder}/{name}.qcow2"
            copy_sink = _sink(stack, folder, path, len(disk.model))
            pulls.append(
                copy.Pull(
                    target=name, source=stack.enter_context(disk.export()), capacity=len(disk.model), bitmap=None,
                    copy=copy.ALL, expected=0, sink=copy_sink, also=none_also, delta=nothing, contents=nothing,
                )
            )  # fmt: skip
        begun = time.monotonic()
        counts = copy.pull(pulls, lanes.Options(bandwidth=LIMIT), progress=progress, stop=nothing)
    assert [one.read_bytes for one in counts] == [2 * MIB, 2 * MIB]
    assert max(ended.values()) - begun > 4 * MIB / LIMIT - lanes.BURST_SECONDS - 2 * MIB / 8 / LIMIT
    # Halfway through, neither is far ahead of the other.
    half = seen[: len(seen) // 2]
    assert abs(half.count("vda") - half.count("vdb")) <= 3


def _sink(stack: ExitStack, folder: str, path: str, size: int) -> copy.Sink:
    qcow2.create_layer(path, size, backing=None, compress=True)
    return copy.Sink(stack.enter_context(server.sink(path, folder, compress=True)), path, False)


def test_an_audit_is_limited_too(folder: str, rng: random.Random) -> None:
    disk = filled(folder, rng)
    chain = Chain(folder)
    with disk.export() as source:
        chain.backup(source, disk.model, None)
        with server.chain([chain.layers[0].path], folder) as stored:
            one = audit.Compare(
                target="vda", source=source, chain=stored, capacity=len(disk.model), bitmap=None,
                also=none_also, differs=nothing,
            )  # fmt: skip
            begun = time.monotonic()
            [found] = audit.compare([one], lanes.Options(bandwidth=LIMIT), progress=nothing, stop=nothing)
    assert (found.compared_bytes, found.differing_bytes) == (len(disk.model), 0)
    assert time.monotonic() - begun > len(disk.model) / LIMIT - lanes.BURST_SECONDS - 256 * 1024 / LIMIT


def test_a_slow_copy_is_not_taken_for_a_stalled_one_and_can_be_stopped(folder: str, rng: random.Random) -> None:
    disk = filled(folder, rng, MIB)
    slow = lanes.Options(bandwidth=lanes.SLOWEST, stall_seconds=1.0)
    begun = time.monotonic()

    def stop() -> None:
        if time.monotonic() - begun > 2.5:
            raise errors.Interrupted(number=15, signal="SIGTERM")

    with disk.export() as source, pytest.raises(errors.Interrupted):
        Chain(folder, slow).backup(source, disk.model, None, stop=stop)


def test_zeroes_cost_nothing(folder: str) -> None:
    disk = Disk(folder, 64 * MIB)
    chain = Chain(folder, lanes.Options(bandwidth=lanes.SLOWEST))
    watch = patience.Stopwatch()
    with disk.export() as source:
        assert chain.backup(source, disk.model, None).pulled.read_bytes == 0
    assert watch.seconds() < 30


@pytest.mark.parametrize(("text", "count"), [("65536", 65536), ("64K", 65536), ("8M", 8 * MIB), ("2G", 2048 * MIB)])
def test_sizes_may_have_a_unit(text: str, count: int) -> None:
    assert copying.Size().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "1T", "8m", "8 M", "9" * 13, "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        copying.Size().convert(text, None, None)


def test_a_limit_below_one_grain_a_second_is_refused() -> None:
    with pytest.raises(errors.Usage, match="--bandwidth"):
        lanes.Options(bandwidth=extents.GRAIN - 1)


def test_what_was_not_used_is_made_up_for_only_a_little() -> None:
    rate = lanes.Rate(MIB)
    time.sleep(3 * lanes.BURST_SECONDS)
    rate.spend(MIB)
    assert rate.wait > 1 - 1.5 * lanes.BURST_SECONDS
