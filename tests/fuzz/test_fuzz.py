"""Every input that was ever found, and some that hypothesis thinks of; `script/fuzz` looks for more for minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Final, List

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import shapes, targets

MOST: Final = 64 * 1024


def inputs(name: str) -> List[Path]:
    return sorted((shapes.CORPUS / name).iterdir())


def test_every_target_has_a_corpus_and_shapes() -> None:
    assert sorted(targets.TARGETS) == sorted(path.name for path in shapes.CORPUS.iterdir()) == sorted(shapes.shapes())


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_the_corpus(name: str) -> None:
    found = inputs(name)
    assert len(found) >= 3 and sum(path.stat().st_size for path in found) <= 2 * MOST
    for path in found:
        try:
            targets.TARGETS[name](path.read_bytes())
        except Exception as e:
            raise AssertionError(f"{path.name}: {e!r}") from e


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_what_is_nearly_right(name: str) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(shapes.shapes()[name])
    def judged(data: bytes) -> None:
        targets.TARGETS[name](data)

    judged()
