"""Which domains of a host the configuration is for, and what it says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, List, Optional, Sequence

from libvirt_cbt import errors, names
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.config import Config, Place, Rules
from libvirt_cbt.hypervisor import defining, domain, made


@dataclass(frozen=True)
class Chosen:
    """A domain of a host; `skipped` is the reason why `run` leaves it out, None when it does not."""

    place: Place
    name: str
    uuid: names.DomainUuid
    policy: Optional[str]
    rules: Rules
    skipped: Optional[str]


def chosen(session: Session, config: Config, place: Place) -> List[Chosen]:
    """Every domain of the host that the session is connected to, by name.  Errors: NoHypervisor."""
    return [_chosen(session, config, place, name, uuid) for name, uuid in session.host.all()]


def _chosen(session: Session, config: Config, place: Place, name: str, uuid: names.DomainUuid) -> Chosen:
    policy = config.policy_of(place.name, name, uuid)
    rules = config.rules(policy)
    return Chosen(place, name, uuid, policy, rules, _skipped(session, config, policy, rules, uuid))


def _skipped(
    session: Session, config: Config, policy: Optional[str], rules: Rules, uuid: names.DomainUuid
) -> Optional[str]:
    if policy is None:
        return "no policy matches it"
    if config.policy[policy].skip:
        return "its policy leaves it out"
    try:
        if not (rules.shut_off and session.host.site.still) and not domain.alive(session.host, uuid):
            return "it is off" + ("" if session.host.site.still else ", and by TLS its images are out of reach")
        if defining.record(made.inactive_xml(session.host, uuid)) is not None:
            return "it was made by `boot`, and runs from a backup"
    except errors.NoSuchDomain:
        return "it has just gone"
    return None


def require_known(domains: Collection[str], known: Collection[str]) -> None:
    """`known` are the names and UUIDs of what the hosts have.  Errors: NotFound for the first that is none of them."""
    for name in domains:
        if name not in known:
            raise errors.NotFound(reason=f"no host has a domain '{names.printable(name)}'; `libvirt-cbt config` lists them")


def named(found: Sequence[Chosen], domains: Collection[str]) -> List[Chosen]:
    """Those of the domains that are named, by name or UUID; all when none is."""
    return [one for one in found if not domains or one.name in domains or one.uuid in domains]


def files(session: Session, config: Config) -> results.ConfigFiles:
    """What was read, and what it says for all domains."""
    return results.ConfigFiles(list(config.files), session.path, config.model_dump(mode="json", exclude={"files"}))


def configured(session: Session, config: Config, place: Place, domains: Collection[str] = ()) -> List[results.Configured]:
    """What holds for each domain of a host, or those named that it has.  Errors: NoHypervisor."""
    return [
        results.Configured(one.name, one.uuid, place.name, one.policy, one.skipped, one.rules.model_dump())
        for one in named(chosen(session, config, place), domains)
    ]
