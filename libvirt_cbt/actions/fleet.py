"""`run` over all domains that a policy matches, on one host or several: who they are, a process for each, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Callable, Collection, Dict, List, Optional, Sequence, Tuple

from pydantic import TypeAdapter, ValidationError

from libvirt_cbt import errors, names
from libvirt_cbt.actions import policies, results, several
from libvirt_cbt.actions.policies import Chosen
from libvirt_cbt.actions.session import Session
from libvirt_cbt.config import Config, Place
from libvirt_cbt.hypervisor import domain
from libvirt_cbt.repository import runs


@dataclass(frozen=True)
class How:
    """What a caller decides: how a host is reached, and the command line that does one domain and prints JSON."""

    connect: Callable[[Place], Session]
    argv: Callable[[Chosen], List[str]]
    told: Callable[[results.Run], None] = lambda _: None
    dry_run: bool = False


@dataclass
class Fleet:
    """Runs in the order of hosts and names; `failures` are of hosts and of names, before any of the runs."""

    runs: List[results.Run] = field(default_factory=list)
    failures: List[Tuple[str, errors.CbtError]] = field(default_factory=list)
    reached: int = 0  # hosts that have answered

    def fail(self, session: Session, host: str, error: errors.CbtError) -> None:
        self.failures.append((host, error))
        facts = {**error.facts, "kind": error.kind, "code": error.code, **({"host": host} if host else {})}
        session.watch.failed(f"host {host}: {error}" if host else str(error), **facts)

    @property
    def code(self) -> int:
        codes = [error.code for _, error in self.failures] + [one.code for one in self.runs if one.failures]
        return next(iter(codes), max((one.code for one in self.runs), default=0))

    @property
    def error(self) -> Optional[errors.CbtError]:
        """The first failure."""
        for _, error in self.failures:
            return error
        for one in self.runs:
            for failure in one.failures:
                return Failed(one, failure)
        return None


class Failed(errors.CbtError):
    """What failed in the process of a domain, as it was told there."""

    def __init__(self, run: results.Run, failure: results.Failure) -> None:
        self._kind = failure.kind
        super().__init__(reason=failure.message, domain=run.domain, uuid=run.uuid, host=run.host, work=failure.work)
        self.code = failure.code  # type: ignore[misc]

    @property
    def kind(self) -> str:
        return self._kind


def fleet(session: Session, config: Config, places: Sequence[Place], domains: Collection[str], how: How) -> Fleet:
    """Runs every domain that is not left out, or those named, and goes on after what fails.

    `session` is for the repository.  Errors: RunBusy; Usage without a policy; NoRepository and kin.
    """
    if not config.policy:
        files = ", ".join(config.files)
        lacking = f"{files} has no [policy.NAME]" if files else "there is no /etc/libvirt-cbt.toml with a [policy.NAME]"
        raise errors.Usage(reason=f"{lacking}: nothing says what is backed up; libvirt-cbt.toml(5) and docs/automation.md show it")
    repository = session.repository(make=not how.dry_run)
    hosts = [names.without_password(place.uri or session.uri or "") for place in places]
    started = datetime.now(timezone.utc)
    found = Fleet()
    with runs.alone(repository, hosts):
        chosen = _chosen(session, config, places, domains, how, found)
        tasks = [several.Task(one, how.argv(one), _told(one)) for one in chosen]
        if not tasks and not found.failures:
            session.watch.note("no domain is to be backed up; `libvirt-cbt config` shows why")
        ended: Dict[int, results.Run] = {}
        try:
            for one in several.run(tasks, config.jobs_total, session.watch.stop):
                made = _result(one)
                ended[tasks.index(one.task)] = made
                how.told(made)
        except errors.Interrupted as e:
            found.fail(session, "", e)
        found.runs = [made for _, made in sorted(ended.items())]
        # Some domains at noon are not the night's run, nor is a URI with a slip of the pen in it a host.
        if not how.dry_run and not domains and (found.reached or runs.noted(repository, hosts)):
            runs.record(
                repository,
                hosts,
                started=started,
                code=found.code,
                domains=len(tasks),
                failed=[one.uuid for one in found.runs if one.failures],
                host_failures=[runs.host_failure(host, error) for host, error in found.failures],
            )
    return found


def _told(chosen: Chosen) -> Dict[str, str]:
    """Where libvirt is, by the environment: arguments are for everybody to see, and a URI may hold a password."""
    return {"LIBVIRT_DEFAULT_URI": chosen.place.uri} if chosen.place.uri else {}


def _chosen(
    session: Session, config: Config, places: Sequence[Place], domains: Collection[str], how: How, found: Fleet
) -> List[Chosen]:
    """The domains that are to be run; what could not be asked for goes into `found`."""
    seen: List[Chosen] = []
    running: Dict[names.DomainUuid, str] = {}
    for place in places:
        try:
            with how.connect(place) as there:
                here = policies.named(policies.chosen(there, config, place), domains)
                found.reached += 1
                running.update({one.uuid: place.name for one in here if domain.alive(there.host, one.uuid)})
                seen += here
        except errors.CbtError as e:
            found.fail(session, place.name, e)
    # After a migration the definition may stay behind: the images belong to the host where the guest runs.
    seen = [
        replace(one, skipped=one.skipped or f"it runs on host '{running[one.uuid]}'")
        if running.get(one.uuid, one.place.name) != one.place.name
        else one
        for one in seen
    ]
    for name in domains:
        reason = _unfit(name, seen)
        if reason and not found.failures:
            found.fail(session, "", reason)
    return [one for one in seen if not one.skipped]


def _unfit(name: str, seen: Sequence[Chosen]) -> Optional[errors.CbtError]:
    """Why a domain that was named cannot be run."""
    named = policies.named(seen, [name])
    shown = names.printable(name)
    if not named:
        return errors.NotFound(reason=f"no host has a domain '{shown}'; `libvirt-cbt config` lists them")
    if all(one.skipped for one in named):
        return errors.Usage(reason=f"domain '{shown}' is left out: {named[0].skipped}")
    return None


def _result(ended: several.Ended) -> results.Run:
    """What a process said, or how it ended without a word."""
    document = ended.document or {}
    try:
        (made,) = TypeAdapter(List[results.Run]).validate_python(document.get("results"))
    except (ValidationError, ValueError):
        chosen = ended.task.chosen
        name = names.printable(chosen.name)
        error = document.get("error") or errors.RunEnded(domain=name, how=ended.how).document()
        failure = results.Failure("run", int(error["code"]), str(error["kind"]), str(error["message"]))
        return results.Run(
            chosen.name, chosen.uuid, chosen.place.name, chosen.policy, failure.code, None, None, None, [failure], 0.0
        )
    return made
