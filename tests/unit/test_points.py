from __future__ import annotations

import pytest

from libvirt_cbt import errors, points

LINEAGE = "0123abcd-0123-4567-89ab-0123456789ab"


def test_at() -> None:
    assert points.at("latest") == points.Latest()
    assert points.at("7") == points.Generation(7)
    assert points.at("beef") == points.Id("beef")
    assert points.at("1234567890123456") == points.Id("1234567890123456")
    assert points.at("123456789012345") == points.Generation(123456789012345)


@pytest.mark.parametrize(
    "text", ["", "-1", "abc", "*", "latest ", "7\n", "beef" * 5, "1" * 17, "BEEF", "../x", "\u0667"]
)
def test_at_refuses(text: str) -> None:
    with pytest.raises(errors.Usage):
        points.at(text)


def test_since_and_until() -> None:
    text = f"cbt1:{LINEAGE}/12-0123abcd"
    assert points.since(text) == points.until(text) == points.ChangeId(LINEAGE, 12, "0123abcd")
    assert str(points.since(text)) == text
    assert points.since("*") == points.Beginning()
    with pytest.raises(errors.Usage):
        points.until("*")


@pytest.mark.parametrize(
    "text",
    [
        f"cbt1:{LINEAGE}/0-0123abcd",
        f"cbt1:{LINEAGE}/1-0123abc",
        f"cbt2:{LINEAGE}/1-0123abcd",
        f"cbt1:{LINEAGE}/1-0123abcd\n",
        "cbt1:" + "-" * 36 + "/1-0123abcd",
        # uuid.UUID() drops dashes wherever they stand: this is no lineage of ours all the same
        "cbt1:0123abcd0123456789ab0123456789ab----/1-0123abcd",
    ],
)
def test_until_refuses(text: str) -> None:
    with pytest.raises(errors.Usage):
        points.until(text)
