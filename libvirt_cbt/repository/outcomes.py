"""How work on a domain failed last: REPO/<domain-uuid>/outcomes.json, a note that nothing depends on.

It is written after the work has ended and cleaned up, under the domain's lock, and never in the way of anything: what
cannot be noted is not.  A failure counts for as long as no later success is known.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Dict, Final, Iterator, Literal

from pydantic import Field

from libvirt_cbt import durable, errors, names
from libvirt_cbt.repository.manifest import Bytes, Hex16, Model, Sealed, Uuid
from libvirt_cbt.repository.store import DomainStore

FILE: Final = "outcomes.json"
LONGEST: Final = 1000  # characters of a sentence

Work = Literal["backup", "audit", "prune", "verify"]


class Outcome(Model):
    """`code` 0: it went well; `newest` is the newest generation that was there when it ended."""

    time: str = Field(max_length=40)
    code: Bytes
    kind: str = Field(max_length=100)
    message: str = Field(max_length=LONGEST + 10)
    newest: Bytes


class Outcomes(Sealed):
    repository: Hex16
    domain: Uuid
    last: Dict[Work, Outcome]


@contextmanager
def noted(kept: DomainStore, *work: Work) -> Iterator[None]:
    """Work whose end is noted; the locks that it takes are free again before.

    A word mistyped on a command line is no failure of a backup's.
    """
    try:
        yield
    except (errors.Usage, errors.NotFound):
        raise
    except BaseException as error:
        failed(kept, work[0], error)
        raise
    for one in work:
        succeeded(kept, one)


def failed(kept: DomainStore, work: Work, error: BaseException) -> None:
    """Notes a failure, if that can be done at once."""
    code = error.code if isinstance(error, errors.CbtError) else errors.CbtError.code
    kind = error.kind if isinstance(error, errors.CbtError) else type(error).__name__
    _note(kept, work, code, kind, names.printable(str(error), LONGEST))


def succeeded(kept: DomainStore, work: Work) -> None:
    """Notes a success where it is news: after a failure, and of every audit."""
    try:
        before = read(kept).get(work)
    except errors.CbtError:
        before = None
    if work == "audit" or (before and before.code):
        _note(kept, work, 0, "", "")


def _note(kept: DomainStore, work: Work, code: int, kind: str, message: str) -> None:
    try:
        with kept.lock():
            try:
                last = read(kept)
            except errors.Damaged:
                last = {}
            generations = kept.ids() and kept.generations()
            last[work] = Outcome(
                time=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                code=code,
                kind=kind,
                message=message,
                newest=generations[-1].generation if generations else 0,
            )
            made = Outcomes(repository=kept.repository.id, domain=kept.uuid, last=last)
            durable.replace(os.path.join(kept.path, FILE), made.dump())
    except (OSError, errors.CbtError):
        pass  # a full or read-only disk, or somebody else at work: what failed is told all the same


def read(kept: DomainStore) -> Dict[Work, Outcome]:
    """What is noted, by work.  Errors: Damaged, also for a note of another repository or domain; RepositoryDenied."""
    path = os.path.join(kept.path, FILE)
    with durable.explained(kept.repository.path, path):
        try:
            found = Outcomes.load(path)
        except FileNotFoundError:
            return {}
    if (found.repository, found.domain) != (kept.repository.id, kept.uuid):
        raise errors.Damaged(path=path, reason="it belongs to another domain or repository")
    return dict(found.last)


def failing(kept: DomainStore) -> Dict[Work, Outcome]:
    """The failures after which nothing went well: a backup is known by its generation.  Errors: those of `read`."""
    newest = max((m.generation for m in kept.generations() if m.kind != "mark"), default=0)
    return {
        work: outcome
        for work, outcome in read(kept).items()
        if outcome.code and not (work == "backup" and newest > outcome.newest)
    }
