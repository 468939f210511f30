"""What libvirt says of a job that is about to end."""

from __future__ import annotations

from typing import Any, Dict, List

import libvirt
import pytest

from libvirt_cbt.hypervisor import job


class Domain:
    """Its statistics, one answer after the other; the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers: List[Any] = list(answers)

    def jobStats(self) -> Dict[str, Any]:  # noqa: N802 -- libvirt's name
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, str):
            libvirt.virResetLastError()  # of an earlier test: an error tells of it instead
            raise libvirt.libvirtError(answer)
        return dict(answer)


GONE = "internal error: backup job data missing"


def test_a_backup_on_its_way_out_is_asked_about_again() -> None:
    assert job._statistics(Domain(GONE, GONE, {"type": 0})) == {"type": 0}


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ENDING_SECONDS", 0.05)
    with pytest.raises(libvirt.libvirtError, match=GONE):
        job._statistics(Domain(GONE))


def test_another_error_is_one_at_once() -> None:
    with pytest.raises(libvirt.libvirtError, match="no domain"):
        job._statistics(Domain("no domain", {"type": 0}))
