"""One `run` at a time of the same hosts into a repository, and how it ended: REPO/run-<key>.lock and .json.

The note is written after everything else, and nothing depends on it.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Final, Iterator, List, Sequence

import blake3
from pydantic import Field

from libvirt_cbt import durable, errors, names
from libvirt_cbt.repository import lock
from libvirt_cbt.repository.manifest import Bytes, Hex16, Model, Sealed, Uuid
from libvirt_cbt.repository.store import Repository

LONGEST: Final = 1000  # characters of a sentence


class HostFailure(Model):
    """A host whose domains could not be asked for."""

    host: str
    code: Bytes
    message: str = Field(max_length=LONGEST + 10)


class Run(Sealed):
    """`code` is the exit code; `failed` are the domains that did, `domains` a count."""

    repository: Hex16
    tool_host: str
    hosts: List[str]
    started: str = Field(max_length=40)
    ended: str = Field(max_length=40)
    code: Bytes
    domains: Bytes
    failed: List[Uuid]
    host_failures: List[HostFailure]


def key(hosts: Sequence[str]) -> str:
    """Of the hosts that a run goes over, from this machine."""
    return blake3.blake3("\n".join((socket.gethostname(), *sorted(hosts))).encode(errors="replace")).hexdigest()[:16]


@contextmanager
def alone(repository: Repository, hosts: Sequence[str]) -> Iterator[None]:
    """Errors: RunBusy."""
    path = os.path.join(repository.path, f"run-{key(hosts)}.lock")
    with lock.exclusive(path, repository.path, lambda owner: errors.RunBusy(repository=repository.path, owner=owner)):
        yield


def noted(repository: Repository, hosts: Sequence[str]) -> bool:
    """Whether a run over these hosts was recorded before."""
    return os.path.exists(os.path.join(repository.path, f"run-{key(hosts)}.json"))


def record(
    repository: Repository,
    hosts: Sequence[str],
    *,
    started: datetime,
    code: int,
    domains: int,
    failed: Sequence[str],
    host_failures: Sequence[HostFailure],
) -> None:
    """Notes a run that has just ended, under its lock; what cannot be noted is not."""
    try:
        made = Run(
            repository=repository.id,
            tool_host=socket.gethostname(),
            hosts=list(hosts),
            started=_written(started),
            ended=_written(datetime.now(timezone.utc)),
            code=code,
            domains=domains,
            failed=list(failed),
            host_failures=list(host_failures),
        )
        durable.replace(os.path.join(repository.path, f"run-{key(hosts)}.json"), made.dump())
    except (OSError, errors.CbtError):
        pass


def host_failure(host: str, error: errors.CbtError) -> HostFailure:
    return HostFailure(host=host, code=error.code, message=names.printable(str(error), LONGEST))


def last(repository: Repository) -> List[Run]:
    """How each run of other hosts ended last; what is damaged is left out."""
    found: List[Run] = []
    with durable.explained(repository.path, repository.path):
        entries = sorted(os.listdir(repository.path))
    for entry in entries:
        if entry.startswith("run-") and entry.endswith(".json"):
            try:
                one = Run.load(os.path.join(repository.path, entry))
            except (OSError, errors.CbtError):
                continue
            if one.repository == repository.id:
                found.append(one)
    return found


def _written(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
