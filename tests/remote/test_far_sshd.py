"""The far host of these tests itself: its sshd ends with the process that started it, however that ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from tests.guests import far as fars

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORKER = """
import json, sys
from types import SimpleNamespace
from tests.guests import far
started = far.Far(SimpleNamespace(**json.loads(sys.argv[1]), enter=lambda: json.loads(sys.argv[2]))).__enter__()
print(json.dumps({"folder": started.folder, "address": far.ADDRESS, "port": started.port}), flush=True)
sys.stdin.read()
"""


def _listens(worker: SimpleNamespace) -> bool:
    try:
        socket.create_connection((worker.address, worker.port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_worker_that_is_killed_leaves_no_sshd(far: fars.Far) -> None:
    """So pytest-timeout ends one whose call into libvirt does not return."""
    host = json.dumps({"root": far.host.root, "socket": far.host.socket})
    argv = [sys.executable, "-c", WORKER, host, json.dumps(far.host.enter())]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        worker = SimpleNamespace(**json.loads(process.stdout.readline()))
        listened = _listens(worker)
        process.kill()
    try:
        assert listened
        deadline = time.monotonic() + 30
        while _listens(worker):
            assert time.monotonic() < deadline, "its sshd is left"
            time.sleep(0.02)
    finally:
        shutil.rmtree(worker.folder)
