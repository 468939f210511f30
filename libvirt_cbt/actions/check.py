"""Whether the backups are as they should be, for monitoring: ages, failures, damage, room, against the policies' limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Collection, Dict, Final, List, Optional, Sequence, Tuple

from libvirt_cbt import errors, names
from libvirt_cbt.actions import health, policies, results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.config import Config, Place, Rules

# In the order of weight: what is critical is not hidden by what is not known.
STATES: Final[Dict[str, int]] = {"ok": 0, "warning": 1, "unknown": 3, "critical": 2}
HOUR: Final = 3600


def check(
    session: Session,
    config: Config,
    domains: Collection[str] = (),
    *,
    limits: Optional[Dict[str, Optional[float]]] = None,
    places: Sequence[Place] = (),
    connect: Optional[Callable[[Place], Session]] = None,
) -> results.Checked:
    """Checks the domains that the policies match, or those named, or without policies all that the repository holds.

    `limits` (as warning_age, critical_age, warning_verified, critical_verified in seconds, warning_free, critical_free
    in percent) stand above what the configuration says.  With `connect` the hosts of `places` are asked which domains
    there are, so that one that was never backed up is missed.  Whatever cannot be found out is a problem in the result.
    """
    look = _Look(session, config, {k: v for k, v in (limits or {}).items() if v is not None})
    try:
        look.repository()
        for uuid, name, rules in look.expected(domains, places, connect):
            look.domain(uuid, name, rules)
    except errors.CbtError as e:
        look.problem("unknown", None, str(e))
    return look.result()


class _Look:
    def __init__(self, session: Session, config: Config, limits: Dict[str, float]) -> None:
        self._session, self._config, self._limits = session, config, limits
        self._now = health.now()
        self._found: List[results.DomainHealth] = []
        self._problems: List[results.Problem] = []
        self._figures: List[results.Threshold] = []
        self._runs: List[results.LastRun] = []
        self._space: Tuple[Optional[int], Optional[int]] = (None, None)

    def problem(self, state: str, domain: Optional[str], sentence: str) -> None:
        self._problems.append(results.Problem(state, domain, sentence))

    def _measured(self, figure: results.Threshold, domain: Optional[str], sentence: str) -> None:
        """Notes a figure, and the problem that it is; a limit of 0 is none."""
        figure = replace(figure, warning=figure.warning or None, critical=figure.critical or None)
        self._figures.append(figure)
        for state, limit in (("critical", figure.critical), ("warning", figure.warning)):
            if limit is not None and (figure.value < limit if figure.low else figure.value > limit):
                shown = f"{limit:.0f} %" if figure.unit == "%" else hours(limit)
                self.problem(state, domain, f"{sentence} ({state} {'below' if figure.low else 'above'} {shown})")
                return

    def repository(self) -> None:
        """Room, and how the last runs ended.  Errors: NoRepository and kin."""
        repository = self._session.repository()
        self._space = total, free = health.space(repository)
        of = self._config.check
        limits = {"warning_free": float(of.warning_free), "critical_free": float(of.critical_free), **self._limits}
        percent = round(100 * free / total, 1) if total else 100.0
        figure = results.Threshold("free", percent, "%", limits["warning_free"], limits["critical_free"], low=True)
        self._measured(figure, None, f"{percent:.1f} % of the repository's file system are free")
        self._runs = health.last_runs(repository)
        for one in self._runs:
            for message in one.host_failures:
                self.problem("warning", None, f"the last run was not complete: {message}")

    def expected(
        self, domains: Collection[str], places: Sequence[Place], connect: Optional[Callable[[Place], Session]]
    ) -> List[Tuple[names.DomainUuid, str, Rules]]:
        """UUID, name and rules of each domain that is to be looked at."""
        found: Dict[names.DomainUuid, Tuple[str, Rules]] = {}
        gone: List[str] = []
        if self._config.policy and connect:
            for place in places:
                try:
                    with connect(place) as there:
                        chosen = policies.chosen(there, self._config, place)
                except errors.CbtError as e:
                    gone.append(place.name)
                    self.problem("unknown", None, str(e))
                    continue
                found.update({one.uuid: (one.name, one.rules) for one in chosen if not one.skipped})
        if not (self._config.policy and connect) or gone or domains:
            for uuid in self._session.repository().uuids():
                self._stored(uuid, gone or [""], found)
        for name in domains:
            if not any(name in (uuid, known) for uuid, (known, _) in found.items()):
                self.problem("unknown", name, "no host and no backup has a domain of that name")
        rows = [(uuid, name, rules) for uuid, (name, rules) in found.items()]
        return [row for row in rows if not domains or row[0] in domains or row[1] in domains]

    def _stored(
        self, uuid: names.DomainUuid, hosts: Sequence[str], found: Dict[names.DomainUuid, Tuple[str, Rules]]
    ) -> None:
        """A domain that the repository holds, if a policy would have it: where no host can be asked."""
        kept = self._session.repository().domain(uuid)
        try:
            if not kept.ids():
                return
            name = kept.name
        except errors.CbtError as e:
            self.problem("critical", uuid, str(e))
            return
        policy = next(filter(None, (self._config.policy_of(host, name, uuid) for host in hosts)), None)
        if not self._config.policy or (policy and not self._config.policy[policy].skip):
            found.setdefault(uuid, (name, self._config.rules(policy)))

    def domain(self, uuid: names.DomainUuid, name: str, rules: Rules) -> None:
        kept = self._session.repository().domain(uuid)
        try:
            found = health.domain(kept, self._now)
        except errors.CbtError as e:
            self.problem("critical", name, str(e))
            return
        found = replace(found, domain=name)
        self._found.append(found)
        limits = {**rules.model_dump(include={f"{s}_{w}" for s in ("warning", "critical") for w in ("age", "verified")}), **self._limits}
        if found.age_seconds is None:
            self.problem("critical", name, "it was never backed up")
        else:
            figure = results.Threshold(f"{name} age", found.age_seconds, "s", limits["warning_age"], limits["critical_age"])
            self._measured(figure, name, f"its newest backup is {hours(found.age_seconds)} old")
        if found.unread_seconds is not None:
            unread = found.unread_seconds
            figure = results.Threshold(f"{name} unread", unread, "s", limits["warning_verified"], limits["critical_verified"])
            self._measured(figure, name, f"a backup of it was not re-read for {hours(unread)}")
        for sentence in found.unreadable:
            self.problem("critical", name, sentence)
        if found.damage:
            self.problem("critical", name, f"{found.damage} stretches of its backups are damaged; `libvirt-cbt verify` names them")
        self._figures.append(results.Threshold(f"{name} failing", len(found.failing), "", None, None))
        for failure in found.failing:
            state = "critical" if failure.code == errors.Damaged.code else "warning"
            self.problem(state, name, f"the last {failure.work} failed with {failure.code} at {failure.time}: {failure.message}")

    def result(self) -> results.Checked:
        order = list(STATES)
        state = max((one.state for one in self._problems), key=order.index, default="ok")
        problems = sorted(self._problems, key=lambda one: -order.index(one.state))
        return results.Checked(state, STATES[state], self._found, problems, self._figures, self._runs, *self._space)


def hours(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} h" if seconds < 48 * HOUR else f"{seconds / HOUR / 24:.1f} days"
