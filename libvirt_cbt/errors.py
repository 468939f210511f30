"""Every way this package fails on purpose, one class and one exit code each.

The facts of a failure are attributes (and land in ``--json``); the sentence is
made from the class's ``template``.  It names the thing and the way out.
docs/exit-codes.md is the table for scripts.
"""

from __future__ import annotations

import shlex
import string
from typing import Any, ClassVar, Dict, Final, Optional


def argument(value: object) -> str:
    """A word of a command that people copy from a sentence: quoted for the shell, and never an option.

    The names of guests are other people's.
    """
    return f"-- {quoted(value)}" if str(value).startswith("-") else quoted(value)


def quoted(value: object) -> str:
    """The same behind an option, whose value may begin with anything."""
    return shlex.quote(str(value))


class _Sentence(string.Formatter):
    """str.format, and `{name!q}` for an argument of a command."""

    def convert_field(self, value: Any, conversion: Optional[str]) -> Any:
        return argument(value) if conversion == "q" else super().convert_field(value, conversion)


_SENTENCE: Final = _Sentence()


class CbtError(Exception):
    """A failure that a user can cause or should be told of in one sentence."""

    code: ClassVar[int] = 70
    template: ClassVar[str] = "{reason}"

    def __init__(self, **facts: Any) -> None:
        self.facts: Dict[str, Any] = facts
        super().__init__(_SENTENCE.format(self.template, **facts))

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def message(self) -> str:
        return str(self)

    def add(self, sentence: str) -> None:
        """What the user must know besides."""
        self.args = (f"{self}; {sentence}",)

    def document(self) -> Dict[str, Any]:
        """The ``error`` object of ``--json``: code, kind, message and the facts."""
        return {"code": self.code, "kind": self.kind, "message": self.message, **self.facts}


# 2: the command line does not make sense


class Usage(CbtError):
    code = 2


class DiskUnprotected(Usage):
    """`--require-all` and the domain as it is do not go together; nothing was begun, and waiting changes nothing."""

    template = (
        "not every disk of domain '{domain}' would be in the backup ({disks}); "
        "leave disks out by name with --exclude, or go without --require-all"
    )


class ConfigInvalid(Usage):
    template = "{path}: {reason}"


class WouldBePlaintext(Usage):
    """QEMU decrypts what it exports; scratch files and layers would hold what the owner wanted encrypted."""

    template = (
        "disks of domain '{domain}' are encrypted by its QEMU ({disks}), and backups, and scratch files meanwhile, would "
        "hold them in plaintext; give --allow-plaintext if that is wanted, or leave them out with --exclude"
    )


class Unencrypted(Usage):
    """A connection, and the data of a guest after it, that anybody on the way could read and change."""

    template = "{uri} is not protected on its way ('{transport}'); use qemu+ssh:// or qemu+tls:// (docs/remote.md)"


class Elsewhere(Usage):
    """What works on the guest's files, on a connection to another host."""

    template = "{what} needs the guest's own files, and they are on {host}: {way_out}"


# 10: no such thing


class NotFound(CbtError):
    code = 10


class NoSuchDomain(NotFound):
    template = "no domain '{domain}' on {uri}; `virsh -c {uri!q} list --all` shows the names"


class NoSuchDisk(NotFound):
    template = "domain '{domain}' has no disk '{target}'; it has: {known}"


class NoSuchBackup(NotFound):
    template = "'{domain}' has no backup '{point}' in {repository}; `libvirt-cbt list {domain!q}` shows what it has"


class NotInRepository(NotFound):
    template = "repository {repository} holds nothing of domain '{domain}'; `libvirt-cbt list` shows what it holds"


class NoRepository(NotFound):
    template = "no repository at {repository}; make one with `libvirt-cbt -r {repository!q} init`, or check the path"


class NoPointOpen(NotFound):
    template = "no fleecing point of domain '{domain}' is open; `libvirt-cbt start {domain!q}` opens one"


class NoSuchBoot(NotFound):
    template = "no domain '{name}' was made by `libvirt-cbt boot` here; `virsh list --all` shows the names"


# 11: busy


class Busy(CbtError):
    code = 11


class DomainBusy(Busy):
    template = "domain '{domain}' is busy with {job}{since}; wait for it, or give --wait SECONDS"


class PointOpen(Busy):
    template = (
        "a fleecing point of domain '{domain}' is open since {since}; `libvirt-cbt stop {domain!q}` commits it, "
        "`stop --discard` gives it up"
    )


class ImageInUse(Busy):
    """An image of a guest that is off is open elsewhere."""

    template = "the image {path} of disk '{target}' is in use by {holder}; end that or wait for it, and run it again"


class RepositoryBusy(Busy):
    template = "domain '{domain}' is locked in {repository} by {owner}; try again when that has ended"


class RunBusy(Busy):
    """Another `run` of the same hosts into the same repository."""

    template = "a run into {repository} is going on: {owner}; wait for it, or end it"


class IdentityTaken(Busy):
    template = "{what} is taken by domain '{domain}' on {uri}; {way_out}"


class NotShutOff(Busy):
    template = "domain '{domain}' is not simply shut off: {reason}"


class TargetInUse(Busy):
    """For an image, or a device, that somebody else has open."""

    template = "{path} is in use: {reason}"


class LayerInUse(Busy):
    template = (
        "another program has the layer {path} open for writing, which nothing but libvirt-cbt may; end it, run this again, "
        "and then `libvirt-cbt verify`"
    )


class ChainPinned(Busy):
    template = (
        "backup {backup} of domain '{domain}' is being read (restore, verify, serve or another reader), "
        "so its layers stay as they are; prune again when that has ended"
    )


# 12: tracking broken


class TrackingBroken(CbtError):
    code = 12


class ChangeIdBroken(TrackingBroken):
    """A change id of another disk, lineage or repository, or from before a run was discarded or an old copy put back."""

    template = "change id {point} is not of this repository's history: {reason}; take everything (--since '*')"


class GenerationUnknown(TrackingBroken):
    """A generation that a query names and that is not here (any more, or yet)."""

    template = (
        "'{domain}' has no generation {point} in {repository}: {reason}; "
        "`libvirt-cbt list {domain!q}` shows what it has, --since '*' takes everything"
    )


class LineageBroken(TrackingBroken):
    """Facts of a break between two generations: since_lineage and until_lineage (UUIDs or None), and broken_by, the
    reason that the manifest of the generation gives for its new lineage.
    """

    template = (
        "not all changes of disk '{target}' are known: generation {generation} {reason}; take everything (--since '*')"
    )


class BeginningUnknown(LineageBroken):
    """Everything was asked for, and neither the beginning of the lineage nor a backup stands for what was there then."""

    template = (
        "not all that disk '{target}' holds is known: generation {generation} {reason}, and no backup after it holds this "
        "disk; make a backup, and ask for everything up to it"
    )


# 13: the source went away


class SourceLost(CbtError):
    code = 13
    template = "lost the source of disk '{target}' during the copy: {reason}; nothing was published, run it again"


class PointLost(SourceLost):
    template = (
        "the fleecing point of domain '{domain}' was lost before it was stopped: {reason}; its generation is given up, "
        "open another one"
    )


class SourceStalled(SourceLost):
    template = (
        "disk '{target}' has delivered nothing for {seconds:.0f} s; "
        "nothing was published, look whether the guest's QEMU hangs and run it again"
    )


class SourceUnreadable(SourceLost):
    template = (
        "the hypervisor cannot read disk '{target}' at offset {offset}, length {length}: {reason}; "
        "nothing was published, look at the host's storage"
    )


# 14: scratch space


class ScratchSpace(CbtError):
    code = 14
    template = (
        "{directory} has {free} bytes free and the scratch files need at least {needed}; "
        "free some or name another place with --scratch-dir"
    )


class ScratchExhausted(CbtError):
    code = 14
    template = (
        "the backup was ended because {directory} had only {free} bytes left and the guest's own writes would have "
        "failed; the next run is an increment: free some space, or name another place with --scratch-dir"
    )


class TookTooLong(CbtError):
    code = 14
    template = (
        "the backup of '{domain}' was ended after {seconds:.0f} s (--max-duration); "
        "the next run is an increment, nothing was published"
    )


class ScratchDenied(CbtError):
    code = 14
    template = "cannot make scratch files in {directory}: {reason}; name another place with --scratch-dir"


class QemuOfAnother(ScratchDenied):
    """A member of the group libvirt, say, with a guest of qemu:///system: only root can make files for its QEMU."""

    template = (
        "the guest's QEMU runs as user {qemu}, and cannot open what user {user} makes for it; run this as root, "
        "or with a libvirt of your own (-c qemu:///session)"
    )


# 15: the repository's own trouble


class RepositoryError(CbtError):
    code = 15


class RepositoryFull(RepositoryError):
    template = (
        "no room left in {repository} while writing {path}; nothing was published, free some space and run it again"
    )


class NoRoomToMerge(RepositoryError):
    template = (
        "{repository} has {free} bytes free and taking away backup {backup} needs about {needed} for a while, as a newer "
        "backup takes over its disk {target}; free some space, or remove a whole old chain first"
    )


class RepositoryDenied(RepositoryError):
    template = "cannot use repository {repository}: {reason}"


class RepositoryForeign(RepositoryError):
    template = "{repository} is not a libvirt-cbt repository and not empty; give an empty or new directory"


class RepositoryVersion(RepositoryError):
    template = (
        "repository {repository} has format {found}, this libvirt-cbt knows {known}; "
        "use the release that wrote it, or a newer one"
    )


class TargetExists(RepositoryError):
    template = "{path} exists already and is never overwritten; name another --output or remove it first"


class OutputFailed(RepositoryError):
    template = "cannot write {path}: {reason}"


# 16: damage


class Damaged(CbtError):
    code = 16
    template = "{path} is damaged: {reason}; `libvirt-cbt verify` shows what depends on it"


class AuditFailed(CbtError):
    code = 16
    template = (
        "the guest '{domain}' holds data that neither its backups nor its bitmaps know ({differences}); nothing was "
        "published: `libvirt-cbt backup --audit --heal {domain!q}` stores it, `libvirt-cbt verify {domain!q}` checks the backups"
    )


# 17: not consistent though it was required


class NotConsistent(CbtError):
    code = 17
    template = "guest '{domain}' could not be frozen: {reason}; use --quiesce auto to go on without"


# 18: a script or hook of the administrator's said no


class HookStopped(CbtError):
    """Also for hooks of other packages: whoever raises it in `pre` stops the verb."""

    code = 18
    template = "{script} stopped the run at {phase}: {reason}; nothing was published"


# 20: libvirt or NBD


class HypervisorError(CbtError):
    code = 20
    template = "libvirt: {reason}"


class MadeElsewhere(HypervisorError):
    template = (
        "run {id} was begun on {tool_host} for a guest of {host} at {uri}; "
        "what it left is put right from there: `libvirt-cbt -c {uri!q} recover`"
    )


class NoHypervisor(HypervisorError):
    template = "cannot reach libvirt at {uri}: {reason}; is the daemon running and may this user use it?"


class HostUnproved(NoHypervisor):
    template = "host {host} does not prove that it is the one meant: {reason}; {way_out}"


class HostRefused(NoHypervisor):
    template = "host {host} does not let us in: {reason}; {way_out}"


class HostLost(NoHypervisor):
    template = "no connection to host {host}: {reason}; look at the host and the way to it, then run it again"


class ProofNotAsked(NoHypervisor):
    template = (
        "whoever reaches host {host} may read the disks of a guest during its backup: no certificate is asked for; set "
        "backup_tls_x509_verify = 1 in its qemu.conf and restart its libvirt"
    )


class PortsTaken(NoHypervisor):
    template = (
        "on host {host} each port from {low} to {high} is in use; wait for other backups to end, or give other ports "
        "with --nbd-ports"
    )


class NotRunning(HypervisorError):
    template = "domain '{domain}' is {state}; start it first: this needs a running guest"


class ImageUnreadable(HypervisorError):
    template = (
        "disk '{target}' cannot be read while the guest is off: {reason}; "
        "start the guest, or leave the disk out with --exclude {target}"
    )


class BitmapBelow(HypervisorError):
    template = (
        "checkpoint {checkpoint} cannot be removed while the guest is off: a backing file of disk '{target}' has its "
        "bitmap, too; start the guest and run it again"
    )


class NbdError(HypervisorError):
    template = "NBD export '{export}': {reason}"


class RunEnded(HypervisorError):
    """The process of one domain in a `run` of several."""

    template = (
        "the run of domain '{domain}' ended without an answer ({how}); the next one puts right what it left, "
        "`libvirt-cbt list {domain!q}` shows whether there is a new backup"
    )


class ToolMissing(HypervisorError):
    template = "{tool} is not installed; install {package}"


class ToolFailed(HypervisorError):
    template = "{tool} failed: {reason}"


# 128 + N


class Interrupted(CbtError):
    template = "stopped by {signal}; nothing was published, run it again"

    def __init__(self, *, number: int, signal: str) -> None:
        super().__init__(number=number, signal=signal)
        self.code = 128 + number  # type: ignore[misc]
