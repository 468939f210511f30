"""The configuration file as checked values: TOML, strict, and an unknown key is one sentence.

What each key means is said by its `description`; libvirt-cbt.toml(5) is made from them.  A pure reader: nothing here
asks libvirt or looks into a repository.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Dict, Final, List, Literal, Optional, Sequence, Tuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from libvirt_cbt import errors, names, tls

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
MOST_BYTES: Final = 1 << 20
UNITS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# How a value is written, where the kind of it is wrong.
WANTED: Final = {
    "list_type": 'it is a list, such as ["web*", "db1"]',
    "string_type": 'it is text in quotes, such as "web1"',
    "int_type": "it is a number without quotes, such as 7",
    "bool_type": "it is true or false, without quotes",
    "model_type": "it is a table of its own, such as [policy.web] or [defaults]",
    "dict_type": "it is a table for each, such as [policy.web]",
    "too_short": "it is empty",
    "string_too_short": "it is empty",
}
SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def seconds(value: Any) -> float:
    """A duration: seconds as a number, or with a unit, such as "90s", "30min", "26h", "2d", "4w".  Errors: ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12:
        return float(value)
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|min|h|d|w)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f'{json.dumps(value, default=str)} is no duration such as "90s", "30min", "26h", "2d" or "4w"')
    return float(found[1]) * UNITS[found[2]]


def size(value: Any) -> int:
    """Bytes, or with K, M or G behind, powers of 1024.  Errors: ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"([1-9][0-9]{0,11})([KMG]?)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f'{json.dumps(value, default=str)} is no number of bytes such as 8388608, "8192K" or "8M"')
    return int(found[1]) * SIZES[found[2]]


def _ports(value: Any) -> Any:
    if isinstance(value, str):
        tls.ports(value)
    return value


Ports = Annotated[str, BeforeValidator(_ports)]
Seconds = Annotated[float, BeforeValidator(seconds)]
Size = Annotated[int, BeforeValidator(size)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Percent = Annotated[int, Field(ge=0, le=100)]


def _absolute(path: Optional[str]) -> Optional[str]:
    if path is not None and not os.path.isabs(path):
        raise ValueError(f"{json.dumps(path)} is no absolute path")
    return path


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Rules(Model):
    """How a domain is backed up; of [defaults] and of every policy."""

    shut_off: bool = Field(True, description="Back up domains that are off, too.")
    disks: List[Text] = Field([], description="Only these disks (targets, such as vda).")
    exclude_disks: List[Text] = Field([], description="Not these disks; targets that a domain does not have are ignored.")
    require_all: bool = Field(False, description="Fail (2) if any other disk cannot be backed up.")
    allow_plaintext: bool = Field(
        False, description="Back up disks that QEMU encrypts; in the repository they are not encrypted."
    )
    quiesce: Literal["auto", "agent", "none"] = Field(
        "auto", description="Freeze the guest by its agent: if it can be, or fail (17), or not at all."
    )
    scratch_dir: Optional[Text] = Field(None, description="Where QEMU keeps what the guest overwrites during the copy.")
    compress: Literal["zstd", "none"] = Field("zstd", description="How layers are compressed.")
    bandwidth: Optional[Size] = Field(None, description="Read at most so many bytes a second, all disks of a domain together.")
    wait: Seconds = Field(0.0, description="How long to wait for another job on the domain, or its lock, to end.")
    max_duration: Optional[Seconds] = Field(None, description="End the job (14) after that.")
    full_every: Optional[Seconds] = Field(None, description="Copy everything when the newest full backup is older.")
    max_chain: Annotated[int, Field(ge=1, le=150)] = Field(
        60, description="Copy everything, and begin a new chain, when one has so many layers."
    )
    audit_every: Optional[Seconds] = Field(
        None, description="Compare whole disks with the backups when that was last done longer ago (16 if they differ)."
    )
    heal: bool = Field(False, description="With an audit: store what it finds different, and again what is damaged.")
    strict: bool = Field(False, description="Warnings make the exit code 3.")
    keep_last: Optional[Count] = Field(None, description="Keep the newest N backups.")
    keep_hourly: Optional[Count] = Field(None, description="Keep the newest of each of N hours that have one.")
    keep_daily: Optional[Count] = Field(None, description="The same for days (UTC).")
    keep_weekly: Optional[Count] = Field(None, description="The same for weeks.")
    keep_monthly: Optional[Count] = Field(None, description="The same for months.")
    keep_yearly: Optional[Count] = Field(None, description="The same for years.")
    keep_within: Optional[Text] = Field(None, description='Keep all so near to the newest, as "1y5m7d2h".')
    forget: bool = Field(False, description="Drop the generations before the oldest backup, too.")
    verify: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        1,
        description="After each backup re-read it, and so many others, those first that were not re-read for longest; "
        "0: none at all.",
    )
    warning_age: Optional[Seconds] = Field(26 * 3600.0, description="`check` warns when the newest backup is older; 0: never.")
    critical_age: Optional[Seconds] = Field(50 * 3600.0, description="`check` is critical when the newest backup is older; 0: never.")
    warning_verified: Optional[Seconds] = Field(
        90 * 86400.0, description="`check` warns when any stored backup was not re-read for so long; 0: never."
    )
    critical_verified: Optional[Seconds] = Field(None, description="The same, critical.")

    _paths = field_validator("scratch_dir")(_absolute)

    @field_validator("keep_within")
    @classmethod
    def _duration(cls, value: Optional[str]) -> Optional[str]:
        if value is not None and not re.fullmatch(r"(?=.)(\d{1,6}y)?(\d{1,6}m)?(\d{1,6}d)?(\d{1,6}h)?", value, re.ASCII):
            raise ValueError(f"{json.dumps(value)} is no duration such as 1y5m7d2h (years, months, days, hours)")
        return value


class Policy(Rules):
    """Which domains a policy is for, and what differs from [defaults]."""

    match: Annotated[List[Text], Field(min_length=1)] = Field(
        description="Domains: patterns of names (* ? [abc]), or UUIDs.  The first policy that matches a domain holds."
    )
    exclude: List[Text] = Field([], description="Domains that this policy does not match all the same.")
    hosts: List[Text] = Field([], description="Only on these hosts: patterns of the names of [host.NAME]; [] is all.")
    skip: bool = Field(False, description="Leave these domains out.")

    def matches(self, host: str, name: str, uuid: str) -> bool:
        if self.hosts and not any(fnmatch.fnmatchcase(host, pattern) for pattern in self.hosts):
            return False
        return _listed(self.match, name, uuid) and not _listed(self.exclude, name, uuid)


class Host(Model):
    """One libvirt host of several."""

    connect: Text = Field(description="Its libvirt URI.")
    jobs: Optional[Count] = Field(None, description="Domains at once on this host, in place of the `jobs` of all.")
    nbd_ports: Optional[Ports] = Field(None, description="In place of the `nbd_ports` of all.")
    nbd_address: Optional[Text] = Field(None, description="By TLS: the host's address on which its QEMU listens [that of libvirt].")


class Check(Model):
    """Thresholds of `check` that are the repository's."""

    warning_free: Percent = Field(10, description="Warn when less of the repository's file system is free, in percent.")
    critical_free: Percent = Field(5, description="The same, critical.")


class File(Model):
    """One configuration file."""

    connect: Optional[Text] = Field(None, description="libvirt URI, as for virsh.")
    repository: Optional[Text] = Field(None, description="Directory of the backups.")
    scratch_dir: Optional[Text] = Field(
        None, description="Where QEMU keeps what guests overwrite during a copy; for every command."
    )
    hooks_dir: Optional[Text] = Field(None, description="Folder of an administrator's scripts, docs/hooks.md.")
    jobs: Count = Field(2, description="`run`: domains at once on each host.")
    jobs_total: Optional[Count] = Field(None, description="`run`: domains at once on all hosts together.")
    nbd_ports: Optional[Ports] = Field(
        None, description='Hosts by TLS: the ports on which their QEMU may listen, such as "10809-10872".'
    )
    textfile: Optional[Text] = Field(None, description="`run` writes its metrics there at its end, for node_exporter.")
    log: Literal["auto", "stderr", "json", "journald"] = Field(
        "auto", description="Where messages go; auto: to the journal if stderr is connected to it."
    )
    check: Check = Field(Check(), description="Thresholds of `check`.")
    defaults: Rules = Field(Rules(), description="What holds where a policy says nothing else.")
    host: Dict[str, Host] = Field({}, description="Hosts, for a machine that pulls from several.")
    policy: Dict[str, Policy] = Field({}, description="Which domains `run` backs up, and how; the first match holds.")

    _paths = field_validator("repository", "scratch_dir", "hooks_dir", "textfile")(_absolute)


@dataclass(frozen=True)
class Place:
    """A host: its name in the file ("" when there are no names), its URI (None: libvirt's default), domains at once.

    `listening`: where QEMU may listen there, for a host by TLS.
    """

    name: str
    uri: Optional[str]
    jobs: int
    listening: tls.Listening = field(default_factory=tls.Listening)


class Config(File):
    """All files together; `files` are those that were read, `policy` is in the order in which it is tried."""

    files: Tuple[str, ...] = ()

    def places(self) -> List[Place]:
        """Where domains are: every [host.NAME], or one without a name."""
        found = [
            Place(name, one.connect, one.jobs or self.jobs, self.listening(one.nbd_ports, one.nbd_address))
            for name, one in self.host.items()
        ]
        return found or [Place("", self.connect, self.jobs, self.listening())]

    def listening(self, ports: Optional[str] = None, address: Optional[str] = None) -> tls.Listening:
        """What is said of a host, or else of all."""
        asked = ports or self.nbd_ports
        return tls.Listening(tls.ports(asked), address) if asked else tls.Listening(address=address)

    def policy_of(self, host: str, name: str, uuid: str) -> Optional[str]:
        """The name of the policy that holds for a domain."""
        return next((key for key, policy in self.policy.items() if policy.matches(host, name, uuid)), None)

    def rules(self, policy: Optional[str]) -> Rules:
        """What holds under a policy: its own keys, then those of [defaults], then what is built in."""
        own = self.policy[policy].model_dump(exclude_unset=True, include=set(Rules.model_fields)) if policy else {}
        return Rules(**{**self.defaults.model_dump(exclude_unset=True), **own})


def _listed(patterns: Sequence[str], name: str, uuid: str) -> bool:
    return any(fnmatch.fnmatchcase(name, one) or one.lower() == uuid for one in patterns)


def load(paths: Sequence[str], *, given: bool = False) -> Config:
    """What the files say together, the later over the earlier; policies and hosts of a later file come first.

    `given`: the user named them, and answers for them; others must belong to root or the user, and nobody else may be
    able to write to them.  Errors: ConfigInvalid.
    """
    merged: Dict[str, Any] = {}
    for path in paths:
        merged = _laid_over(_parsed(path, given=given), merged)
    return Config.model_validate({**merged, "files": tuple(paths)})


def _laid_over(upper: Dict[str, Any], lower: Dict[str, Any]) -> Dict[str, Any]:
    found = {**lower, **upper}
    for table in ("check", "defaults"):
        found[table] = {**lower.get(table, {}), **upper.get(table, {})}
    for table in ("host", "policy"):  # whole sections, and the order counts
        above = upper.get(table, {})
        found[table] = {**above, **{key: one for key, one in lower.get(table, {}).items() if key not in above}}
    return found


def _parsed(path: str, *, given: bool) -> Dict[str, Any]:
    """The tables of one file, which are right as they are."""
    try:
        with open(path, "rb") as file:
            if not given:
                _require_ours(os.fstat(file.fileno()))
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        found: Dict[str, Any] = tomllib.loads(data.decode())
        File.model_validate(found)
    except OSError as e:
        reason = e.strerror or str(e)
    except ValidationError as e:
        reason = _sentence(e, found)
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except RecursionError:
        reason = "its values are nested too deeply"
    except ValueError as e:
        reason = str(e)
    else:
        return found
    raise errors.ConfigInvalid(path=path, reason=names.printable(reason, 500))


def _require_ours(status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o022:
        raise ValueError("others may write to it; run `chmod go-w` on it")
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"it belongs to user {status.st_uid}, not to root or you; name it with --config if you trust it")


def _sentence(error: ValidationError, tables: Dict[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    # Of a value's own place (a number in a list, a branch of a type) nothing is said beyond the key.
    place: List[str] = []
    at: Any = tables
    for part in first["loc"]:
        if not isinstance(at, dict):
            break
        place.append(str(part))
        at = at.get(part)
    where = f"[{'.'.join(place[:-1])}] " if place[:-1] else ""
    key = place[-1] if place else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(place[:-1]), 1)
        return f"{where}unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; libvirt-cbt.toml(5) lists the keys")
    if first["type"] == "missing":
        return f"{where}key '{key}' is missing"
    return f"{where}{key}: {WANTED.get(first['type']) or re.sub('^Value error, ', '', first['msg'])}"


def _keys(table: Sequence[str]) -> List[str]:
    models: Dict[str, Any] = {"": File, "check": Check, "defaults": Rules, "host": Host, "policy": Policy}
    return sorted(models[table[0] if table else ""].model_fields)
