"""The command `script/bench`."""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any, Callable, Dict, Final, List, Optional, Tuple

import click

from tests.bench import world
from tests.bench.measuring import Effort, Row

# What can be asked for, and the module that has it (with the function, where that has another name).
ROWS: Final[Dict[str, str]] = {
    "version": "starting",
    "nothing": "backups",
    "mark": "backups",
    "increment": "backups",
    "full": "backups",
    "disks": "backups",
    "frozen": "frozen",
    "sizes": "backups",
    "restore": "readers",
    "verify": "readers",
    "extents": "bitmaps.bitmap_extents",
    "query": "query",
    "ssh": "remote",
    "memory": "memory",
    "thousand": "thousand",
    "lasting": "thousand.lasting",
}


def row(name: str) -> Callable[[world.World, Effort], List[Row]]:
    module, _, function = ROWS[name].partition(".")
    found: Callable[[world.World, Effort], List[Row]] = getattr(
        importlib.import_module(f"tests.bench.{module}"), function or name
    )
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("rows", metavar="[ROW]...", nargs=-1, type=click.Choice(list(ROWS)))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each side runs.")
@click.option("--quick", is_flag=True, help="Small data: to see that it works, no figures to keep.")
@click.option("--json", "path", metavar="FILE", type=click.Path(dir_okay=False), help="Where the figures go.")
def command(rows: Tuple[str, ...], rounds: int, quick: bool, path: Optional[str]) -> None:
    """Measure libvirt-cbt beside the least that could do the same; all rows, or those named."""
    found: List[Row] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started
    with world.World(quick=quick) as place:
        for name in rows or ROWS:
            say(f"{name} ...")
            found += row(name)(place, Effort(rounds, quick))
            if path:  # after each, so that a run which is stopped leaves what it has
                write(path, found, rounds=rounds, quick=quick)
    table(found)


def say(sentence: str) -> None:
    print(f"script/bench: {sentence}", file=sys.stderr, flush=True)


def write(path: str, rows: List[Row], *, rounds: int, quick: bool) -> None:
    """One JSON document: what was measured on what, and every sample."""
    document = {
        "version": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "rounds": rounds,
        "quick": quick,
        "rows": [{**asdict(one), "met": one.met} for one in rows],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def machine() -> Dict[str, Any]:
    import libvirt

    from libvirt_cbt.nbdio import client

    qemu = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout
    number = libvirt.getVersion()
    return {
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libvirt": f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}",
        "qemu": qemu.split()[2],
        "libnbd": client.version(),
    }


def table(rows: List[Row]) -> None:
    """What people read; the spread is of the rounds one by one."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("row", "what", "against", "value", "spread", "target", "", "load")
    for one in rows:
        met = {True: "met", False: "MISSED", None: ""}[one.met]
        spread = f"{number(one, one.low)} to {number(one, one.high)}"
        target = "" if one.target is None else number(one, one.target)
        shown.add_row(one.name, one.what, one.against, number(one, one.value), spread, target, met, f"{one.load}")
    Console(width=None if sys.stdout.isatty() else 170).print(shown)


def number(one: Row, value: float) -> str:
    return f"{value:.0f} MB" if one.unit == "MB" else f"{value:.2f}" + (" s" if one.unit == "s" else "")


if __name__ == "__main__":
    command(prog_name="script/bench")
