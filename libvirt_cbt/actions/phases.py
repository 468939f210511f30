"""An administrator's scripts at the phases of a run: hooks.d/<phase>/NN_name.

docs/hooks.md has the contract.  Where nobody has a hooks.d all of it costs one look.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Callable, Dict, Final, Iterator, List, Optional

from libvirt_cbt import errors, names, openstack, scripts
from libvirt_cbt.actions import attending
from libvirt_cbt.actions.session import Session

if TYPE_CHECKING:
    from libvirt_cbt.actions import fleecing, pulling
    from libvirt_cbt.repository import manifest, store

BEFORE_COMMIT: Final = frozenset(scripts.PHASES[: scripts.PHASES.index("committed")])  # there a script may stop the run
SECONDS: Final = 60.0  # for each script
LONGEST: Final = 3600
FROZEN_SECONDS: Final = 3.0  # for all of post-freeze together
STOPS: Final = 2
MARK: Final = "LIBVIRT_CBT_PHASE"  # whoever has it in the environment is such a script: under it no others run


class Phases:
    """The scripts of one run, and what it tells them; made by `around`."""

    def __init__(self, session: Session, verb: str, domain_name: str, found: scripts.Found) -> None:
        self._session, self._found = session, found
        self._attendant: Optional[attending.Attendant] = None
        self._complaints = list(found.refused)
        self._facts: Dict[str, Any] = {
            "verb": verb,
            "domain": {"name": domain_name, "uuid": None, "instance": None},
            "repository": session.path,
            "uri": names.without_password(session.uri) if session.uri else None,
            "backup": None,
            "generation": None,
            "disks": [],
        }
        self._untracked: List[str] = []

    def complaints(self) -> List[str]:
        """What went wrong with scripts since this was last asked: warnings for the result."""
        found, self._complaints = self._complaints, []
        return found

    # The phases, in their order

    def preflight(self, plan: fleecing.Plan) -> None:
        """All is planned and nothing is begun.  Errors: HookStopped."""
        if not self._found.scripts:
            return
        self._untracked = [one.target for one in plan.disks if one.disk.untracked]
        self._facts.update(
            domain={"name": plan.dom.name, "uuid": plan.dom.uuid, "instance": openstack.name(plan.dom.xml)},
            uri=plan.host.uri,
            backup=plan.intent.id,
            generation=plan.generation,
            disks=[
                {
                    "target": one.target,
                    "serial": one.disk.serial,
                    "mode": one.mode,
                    "reason": one.reason,
                    "base": one.base,
                    "capacity": one.disk.capacity,
                }
                for one in plan.disks
            ],
        )
        self._run("preflight", quiesce=plan.request.quiesce)

    @contextmanager
    def bracketed(self, quiesce: str) -> Iterator[None]:
        """Around freeze and thaw: once pre-freeze has begun, post-thaw comes in every outcome.

        If the tool dies in between its attendant runs post-thaw.  Errors: HookStopped.
        """
        if self._found.scripts.get("post-freeze"):
            self._attending()  # its start is not for a frozen guest to wait for
        owed = self._order("post-thaw", {"quiesce": quiesce})
        if owed:
            self._attending().owe(owed)
        try:
            self._run("pre-freeze", quiesce=quiesce)
            yield
        except BaseException:
            self._run("post-thaw", stop=_never, binding=False, quiesce=quiesce)
            raise
        else:
            self._run("post-thaw", quiesce=quiesce)
        finally:
            if self._attendant:
                self._attendant.paid()

    def frozen(self, left: float) -> None:
        """The guest is frozen and must not be so for more than `left` seconds.  Errors: HookStopped."""
        self._run("post-freeze", stop=_never, total=min(FROZEN_SECONDS, left))

    def ready(self, fleece: fleecing.Fleece) -> None:
        """The moment is there to be read.  Errors: HookStopped."""
        if self._found.scripts.get("ready"):
            self._run("ready", exports={target: asdict(one) for target, one in fleece.exported().items()})

    def disks_done(self, reads: Dict[str, pulling.Read]) -> None:
        """All of each disk is in staging, and the guest is left alone again.  Errors: HookStopped."""
        for target, read in reads.items():
            self._run("disk-done", disk={"target": target, "layer": read.layer is not None, **asdict(read.counts)})

    def committed(self, kept: store.DomainStore, made: manifest.Manifest, result: Any) -> List[str]:
        """The generation is published, and nothing stops that any more.  Warnings."""
        self._facts.update(backup=made.id, generation=made.generation)
        self._facts["domain"].update(name=made.domain.name, uuid=made.domain.uuid)
        resets = self._resets(kept, made)
        if resets:
            self._run("lineage-reset", binding=False, resets=resets)
        self._run("committed", binding=False, result=asdict(result))
        return self.complaints()

    def _resets(self, kept: store.DomainStore, made: manifest.Manifest) -> List[Dict[str, Any]]:
        """Disks that begin a new lineage though they had one; those that cannot hold a bitmap never had one to lose."""
        known = {disk.target for older in kept.generations() if older.generation < made.generation for disk in older.disks}
        begun = [d for d in made.disks if d.base is None and d.target in known and d.target not in self._untracked]
        return [{"target": d.target, "lineage": d.lineage, "reason": d.reason} for d in begun]

    def failed(self, error: Exception) -> None:
        """Nothing was published.  What goes wrong here is noted."""
        told = error.document() if isinstance(error, errors.CbtError) else {"code": 70, "message": str(error)}
        self._run("failed", stop=_never, binding=False, error=told)
        for complaint in self.complaints():
            self._session.watch.note(complaint)

    def close(self) -> None:
        if self._attendant:
            self._attendant.close()
            self._attendant = None

    # How they are run

    def _run(
        self,
        phase: str,
        *,
        stop: Optional[Callable[[], None]] = None,
        total: Optional[float] = None,
        binding: bool = True,
        **facts: Any,
    ) -> None:
        """`binding`: a script may stop the run.  Errors: HookStopped; Interrupted when `stop` says so."""
        order = self._order(phase, facts, total)
        if order is None:
            return
        try:
            ended = self._attending().run(order, stop or self._session.watch.stop)
        except errors.Interrupted as e:
            if binding:
                raise
            self._complaints.append(f"the scripts of {phase} were ended: {e.facts['signal']}")
            return
        for one in ended:
            self._judge(phase, one, binding=binding and phase in BEFORE_COMMIT)

    def _judge(self, phase: str, ended: attending.Ended, *, binding: bool) -> None:
        said = names.printable(" ".join(ended.said.split()[-40:]), 500)
        if ended.code == 0:
            if said:
                self._session.watch.note(f"{phase}: {ended.script}: {said}")
            return
        if ended.code == STOPS and binding:
            raise errors.HookStopped(phase=phase, script=ended.script, reason=said or "it says no more")
        how = {None: "was ended when its time was up", 1: "failed"}.get(ended.code, f"failed with exit code {ended.code}")
        self._complaints.append(f"{phase}: {ended.script} {how}" + (f": {said}" if said else ""))

    def _order(self, phase: str, facts: Dict[str, Any], total: Optional[float] = None) -> Optional[attending.Order]:
        paths = self._found.scripts.get(phase)
        if not paths:
            return None
        document = {"version": 1, "phase": phase, **self._facts, **facts}
        told = {
            MARK: phase,
            "LIBVIRT_CBT_VERB": document["verb"],
            "LIBVIRT_CBT_DOMAIN": document["domain"]["name"],
            "LIBVIRT_CBT_UUID": document["domain"]["uuid"],
            "LIBVIRT_CBT_BACKUP": document["backup"],
            "LIBVIRT_CBT_GENERATION": document["generation"],
            "LIBVIRT_CBT_DISK": document.get("disk", {}).get("target"),
            "LIBVIRT_CBT_QUIESCE": document.get("quiesce"),
            "LIBVIRT_CBT_ERROR": document.get("error", {}).get("message"),
            # For this tool and virsh, when a script calls them.
            "LIBVIRT_CBT_REPO": document["repository"],
            "LIBVIRT_DEFAULT_URI": document["uri"],
        }
        environment = {**os.environ, **{name: str(value) for name, value in told.items() if value is not None}}
        return attending.Order(paths, environment, json.dumps(document), _seconds(), total)

    def _attending(self) -> attending.Attendant:
        if self._attendant is None:
            self._attendant = attending.Attendant()
        return self._attendant


def _never() -> None:
    """Nothing ends these but their time."""


def _seconds() -> float:
    """What each script has.  Errors: Usage."""
    asked = os.environ.get("LIBVIRT_CBT_HOOKS_SECONDS", "")
    if not asked:
        return SECONDS
    if not asked.isdecimal() or not 0 < int(asked) <= LONGEST:
        raise errors.Usage(reason=f"LIBVIRT_CBT_HOOKS_SECONDS is a number of seconds up to {LONGEST}, not {asked!r}")
    return float(asked)


@contextmanager
def around(session: Session, verb: str, domain_name: str) -> Iterator[Phases]:
    """The scripts of one run of a verb; `failed` comes when it fails."""
    inside = MARK in os.environ
    one = Phases(session, verb, domain_name, scripts.Found("") if inside else scripts.find(scripts.directory()))
    try:
        yield one
    except errors.Usage:
        raise  # the command line made no sense; nothing was tried
    except Exception as e:
        one.failed(e)
        raise
    finally:
        one.close()
