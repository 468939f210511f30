"""What the verbs return, and what `--json` prints: sizes in bytes, times ISO 8601 UTC, durations in seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from libvirt_cbt.actions.results.generations import (
        Audited,
        Backup,
        BackupDisk,
        Extent,
        Generation,
        Healed,
        Listing,
        Mark,
        MarkDisk,
        OpenDisk,
        OpenPoint,
        Quiesced,
        Start,
        Status,
        StatusDisk,
        Stop,
        Unprotected,
        Unreadable,
    )
    from libvirt_cbt.actions.results.hosting import (
        Checked,
        ConfigFiles,
        Configured,
        DomainHealth,
        Failure,
        Hook,
        HooksInstalled,
        HooksRemoved,
        LastRun,
        Metrics,
        PastFailure,
        Problem,
        Run,
        Threshold,
        Timer,
        TimerInstalled,
        TimerRemoved,
    )
    from libvirt_cbt.actions.results.readings import (
        Boot,
        BootedDisk,
        Damage,
        Defined,
        Discard,
        HeatGeneration,
        Heatmap,
        HeatRegion,
        Lost,
        Restore,
        RestoredFile,
        Serve,
        ServedDisk,
        Verify,
    )
    from libvirt_cbt.actions.results.reports import (
        LastVerify,
        Report,
        ReportDay,
        ReportDisk,
        ReportDomain,
        ReportGeneration,
    )
    from libvirt_cbt.actions.results.upkeep import (
        Check,
        Doctor,
        DoctorDisk,
        Init,
        Kept,
        Merged,
        Protection,
        Prune,
        Recover,
        Removed,
        Skipped,
        Untrack,
    )

__all__ = [
    "Audited",
    "Backup",
    "BackupDisk",
    "Boot",
    "BootedDisk",
    "Check",
    "Checked",
    "ConfigFiles",
    "Configured",
    "Damage",
    "Defined",
    "Discard",
    "Doctor",
    "DoctorDisk",
    "DomainHealth",
    "Extent",
    "Failure",
    "Generation",
    "Healed",
    "HeatGeneration",
    "HeatRegion",
    "Heatmap",
    "Hook",
    "HooksInstalled",
    "HooksRemoved",
    "Init",
    "Kept",
    "LastRun",
    "LastVerify",
    "Listing",
    "Lost",
    "Mark",
    "MarkDisk",
    "Merged",
    "Metrics",
    "OpenDisk",
    "OpenPoint",
    "PastFailure",
    "Problem",
    "Protection",
    "Prune",
    "Quiesced",
    "Recover",
    "Removed",
    "Report",
    "ReportDay",
    "ReportDisk",
    "ReportDomain",
    "ReportGeneration",
    "Restore",
    "RestoredFile",
    "Run",
    "Serve",
    "ServedDisk",
    "Skipped",
    "Start",
    "Status",
    "StatusDisk",
    "Stop",
    "Threshold",
    "Timer",
    "TimerInstalled",
    "TimerRemoved",
    "Unprotected",
    "Unreadable",
    "Untrack",
    "Verify",
]

_ROOMS: Final = ("generations", "readings", "upkeep", "hosting", "reports")  # what a backup needs is in the first


def __getattr__(name: str) -> Any:
    # Imported when they are first used: seventy classes take as long as all of Python's own start.
    for room in _ROOMS if name in __all__ else ():
        found = getattr(importlib.import_module(f"{__name__}.{room}"), name, None)
        if found is not None:
            globals()[name] = found
            return found
    raise AttributeError(name)
