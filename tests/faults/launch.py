"""Runs the command line in a process that is watched from its first step on: started by `tracer`, by path.

What takes long to import is imported before, unwatched: each of its thousands of system calls would cost two stops.
Then it waits for a byte, so that whoever watches has the time to attach.
"""

from __future__ import annotations

import importlib
import os
import sys

del sys.path[0]  # this folder: nothing of the tests is the command's
for name in ("numpy", "pydantic", "lxml.etree", "blake3", "libvirt", "nbd"):
    importlib.import_module(name)
for name in ("backup", "mark", "recover", "restore", "start", "stop", "verify"):
    importlib.import_module(f"libvirt_cbt.actions.{name}")
    importlib.import_module(f"libvirt_cbt.cli.{name}")
command = importlib.import_module("libvirt_cbt.cli")
sys.argv[0] = "libvirt-cbt"
os.read(0, 1)
command.main(sys.argv[1:])
