"""The options of a command that copies, made into one value."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from libvirt_cbt.cli import copying
from libvirt_cbt.nbdio import lanes


def given(**options: Any) -> Dict[str, Any]:
    return {**dict.fromkeys(copying.NAMES), **options}


@pytest.mark.parametrize(("reading", "requests"), [(False, lanes.Options().requests), (True, lanes.READING)])
def test_who_only_reads_has_more_requests_in_flight(reading: bool, requests: int) -> None:
    assert copying.taken(given(bandwidth=1 << 20), reading=reading) == lanes.Options(requests=requests, bandwidth=1 << 20)


@pytest.mark.parametrize("reading", [False, True])
def test_what_was_asked_for_holds(reading: bool) -> None:
    assert copying.taken(given(requests=3), reading=reading) == lanes.Options(requests=3)
