"""The options of every command that copies, made into one value."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Callable, Dict, Final, Optional, TypeVar

import click

if TYPE_CHECKING:
    from libvirt_cbt.nbdio.lanes import Options

F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("requests", "request_size", "connections", "stall_seconds", "bandwidth")
UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Size(click.ParamType):
    """A number of bytes with an optional K, M or G, powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,12})([KMG]?)", str(value))
        if not found:
            self.fail(f"'{value}' is not a number of bytes, such as 8388608, 8192K or 8M", param, ctx)
        return int(found[1]) * UNITS[found[2]]


def options(function: F) -> F:
    """Adds --requests, --request-size, --connections, --bandwidth and --stall-timeout."""
    for add in (
        click.option("--stall-timeout", "stall_seconds", metavar="SECONDS", type=click.FloatRange(min=1),
                     help="Give up (13) when nothing moves for so long [300]."),
        click.option("--bandwidth", metavar="BYTES", type=Size(),
                     help="Read at most so much a second, all disks together; K, M or G behind it [no limit]."),
        click.option("--connections", metavar="N", type=int, help="NBD connections per disk [1]."),
        click.option("--request-size", metavar="BYTES", type=int, help="Of one read, a multiple of 64 KiB [262144]."),
        click.option("--requests", metavar="N", type=int, help="Reads in flight per disk [8; of verify 24]."),
    ):  # fmt: skip
        function = add(function)
    return function


def taken(arguments: Dict[str, Any], *, reading: bool = False) -> Options:
    """Takes those options out of a command's arguments, one that is `reading` alone or not.

    Errors: Usage for values out of range.
    """
    from libvirt_cbt.nbdio.lanes import READING, Options

    given: Dict[str, Any] = {name: arguments.pop(name) for name in NAMES}
    defaults = {"requests": READING} if reading else {}
    return Options(**{**defaults, **{name: value for name, value in given.items() if value is not None}})
