"""What the shapes make depends on what is drawn and on nothing else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import shapes, targets

DOCUMENTS = [name for name in sorted(targets.TARGETS) if any(shapes._loads(one) is not None for one in shapes.seeds(name))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_edits_change_nothing_but_the_document(name: str) -> None:
    before = repr(shapes.ODD)

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(shapes.edited_json(name))
    def made(data: bytes) -> None:
        assert repr(shapes.ODD) == before, "an edit is inside what later ones begin with"

    made()
