"""Which hooks of every kind there are, and which of them are not run and why."""

from __future__ import annotations

from typing import List, Mapping, Optional

import libvirt_cbt
from libvirt_cbt import scripts
from libvirt_cbt.actions import results
from libvirt_cbt.actions.session import Session
from libvirt_cbt.hooks import entrypoints, installing


def listed(session: Session, directories: Mapping[str, Optional[str]]) -> List[results.Hook]:
    """Those of libvirt and vdsm (`directories`: where, by kind), of other packages, and an administrator's scripts.

    Errors: NoRepository and kin.
    """
    found = [installing.status(session, kind, directory=directory) for kind, directory in directories.items()]
    return [*found, *_packages(), *_scripts()]


def _packages() -> List[results.Hook]:
    found = []
    for hook in entrypoints.installed():
        known = hook.verb in libvirt_cbt.VERBS
        state = "ok" if hook.hook is not None and known else "warning"
        unknown = "" if known else ": no verb is called so"
        found.append(results.Hook("entry point", state, f"{hook.verb}{unknown}: {hook.detail}", []))
    return found or [results.Hook("entry point", "absent", f"no package has entry points of group {entrypoints.GROUP}", [])]


def _scripts() -> List[results.Hook]:
    there = scripts.find(scripts.directory())
    found = [results.Hook("script", "ok", phase, list(paths)) for phase, paths in there.scripts.items()]
    found += [results.Hook("script", "warning", sentence, []) for sentence in there.refused]
    return found or [results.Hook("script", "absent", f"no scripts in {there.directory}", [])]
