"""What libvirt-cbt(1) says and no command's help does."""

from __future__ import annotations

from typing import Dict, Final

NAME: Final = "incremental backups of KVM guests by changed-block tracking"
DESCRIPTION: Final = """\
Each backup reads only the blocks that the guest wrote since the last one. Everything that is stored has a digest. Each
backup is a plain qcow2 image, which other tools open, too. Blocks that the guest zeroed or discarded come back as zeroes.

DOMAIN is a name, UUID or id of libvirt's, or what people call an OpenStack instance, where one alone is called so.
DISK is a target (vda) or a serial. A generation is named by its number, a backup's id (or its first digits), or
`latest`.

With --json standard output is exactly one document. An error is one sentence on standard error.
"""
# As docs/exit-codes.md has them.
CODES: Final[Dict[str, str]] = {
    "0": "done",
    "2": "the command line does not make sense",
    "3": "done, with warnings, under `backup --strict`",
    "10": "no such domain, disk, backup or repository",
    "11": "busy: another job on the guest, an image in use, or another run of this tool",
    "12": "tracking broken: what changed is not known",
    "13": "the source was lost during the copy",
    "14": "scratch files: no room, or no permission",
    "15": "repository or output: no room, I/O, permission",
    "16": "damage found",
    "17": "the guest could not be frozen, and `--quiesce agent` was asked for",
    "18": "a hook of the administrator's stopped it",
    "20": "libvirt, NBD or a tool: what is not named above",
    "70": "a bug of libvirt-cbt",
    "128+N": "ended by signal N and cleaned up (130 is Ctrl-C, 143 is SIGTERM)",
}
ENVIRONMENT: Final[Dict[str, str]] = {
    "LIBVIRT_DEFAULT_URI": "The connection, where there is no -c.",
    "LIBVIRT_CBT_REPO": "The repository, where there is no -r.",
    "LIBVIRT_CBT_CONFIG": "The configuration, where there is no --config.",
    "LIBVIRT_CBT_LOG": "Where messages go, where there is no --log.",
    "LIBVIRT_CBT_NBD_PORTS": "Ports on which the QEMU of a host by TLS may listen, where there is no --nbd-ports.",
    "LIBVIRT_CBT_RUN_DIR": "The folder of sockets, in place of /run/libvirt-cbt.",
    "LIBVIRT_CBT_SWTPM_DIR": "Where libvirt keeps the states of emulated TPMs, if it was built for other folders.",
    "LIBVIRT_CBT_SPOOL_DIR": "Where hooks note what happened, in place of /var/lib/libvirt-cbt-spool.",
    "LIBVIRT_CBT_HOOKS_DIR": "An administrator's scripts, in place of /etc/libvirt-cbt/hooks.d.",
    "LIBVIRT_CBT_HOOKS_SECONDS": "The time that each of these scripts has, in place of 60.",
}
FILES: Final[Dict[str, str]] = {
    "/etc/libvirt-cbt.toml, ~/.config/libvirt-cbt.toml": "The configuration, the host's and the user's.",
    "/var/lib/libvirt-cbt": "The repository of root, where nothing names another; otherwise it is in the user's data directory.",
    "/var/lib/libvirt/cbt-scratch": "What guests overwrite while root backs them up.",
    "/etc/libvirt-cbt/hooks.d/PHASE/NN_NAME": "An administrator's scripts.",
}
# A whole configuration, which is in docs/automation.md, too.
EXAMPLE: Final = """\
repository = "/backups"
jobs = 3                              # guests at once
textfile = "/var/lib/prometheus/node-exporter/libvirt-cbt.prom"

[defaults]
keep_daily = 7
keep_weekly = 5
keep_monthly = 12

[policy.scratch]                      # the first that matches holds
match = ["tmp-*", "test-*"]
skip = true

[policy.databases]
match = ["db*"]
quiesce = "agent"                     # consistent or not at all
critical_age = "26h"
audit_every = "30d"

[policy.others]
match = ["*"]
"""
