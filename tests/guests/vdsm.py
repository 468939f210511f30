"""Runs hooks as oVirt's vdsm does (vdsm/lib/vdsm/common/hooks.py: _runHooksDir), so that no oVirt is needed."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Tuple


class HookError(Exception):
    """What vdsm raises: the caller of a before_... hook gives up then."""


class Vdsm:
    """Runs the hooks of an event in order: a document in a file, the VM's id and custom properties as environment.

    `user` is whom they run as, as vdsm is not root either; ourselves without one.
    """

    def __init__(self, folder: Path, user: Optional[int] = None) -> None:
        self.folder, self.user = folder, user
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
        self._prefix = as_user if user is not None else []
        self.said: List[Tuple[str, int, str]] = []

    def run(self, event: str, xml: str, custom: Dict[str, str], *, vm_id: str = "", raises: bool = False) -> str:
        folder = self.folder / event
        scripts = sorted(path for path in folder.glob("*") if path.is_file() and os.access(path, os.X_OK))
        handle, name = tempfile.mkstemp()
        os.write(handle, xml.encode())
        os.close(handle)
        if self.user is not None:
            os.chown(name, self.user, self.user)
        environment = {**os.environ, **custom, "PYTHONPATH": "/usr/lib/vdsm/hook", "_hook_domxml": name}
        environment.update({"vmId": vm_id} if vm_id else {})
        failed = False
        try:
            for script in scripts:
                argv = [*self._prefix, str(script)]
                done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
                self.said.append((script.parent.name, done.returncode, done.stderr))
                failed = failed or done.returncode != 0
                if done.returncode == 2:
                    break
            if failed and raises:
                raise HookError(self.said[-1])
            return Path(name).read_text()
        finally:
            os.unlink(name)
