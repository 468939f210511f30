"""Files of ours in folders of the host's: written whole, never over another's, and only ours are taken away."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Collection, Final, Iterator, List

from libvirt_cbt import durable, errors, folders

OURS: Final = "Made by `libvirt-cbt "
MOST_BYTES: Final = 65536


def require_free(paths: Collection[str]) -> None:
    """Errors: TargetExists for a file that is not ours."""
    for path in paths:
        if os.path.lexists(path) and not ours(path):
            raise errors.TargetExists(path=path)


def content(path: str) -> str:
    """What is there; empty for what is no small file."""
    try:
        return durable.read(path, MOST_BYTES).decode()
    except (OSError, ValueError):
        return ""


def ours(path: str) -> bool:
    return OURS in content(path)


def write(path: str, text: str, mode: int) -> None:
    """In one step.  While it has another name it is not executable, for libvirt runs whatever is, called anything.

    Errors: OutputFailed.
    """
    with writing(path):
        folders.make(os.path.dirname(path), 0o755)
        new = f"{path}.new"
        try:
            os.unlink(new)
        except FileNotFoundError:
            pass
        durable.write_new(new, text.encode())
        os.rename(new, path)
        os.chmod(path, mode)
        durable.sync_directory(os.path.dirname(path))


def removed(path: str) -> List[str]:
    """Errors: OutputFailed."""
    if not ours(path):
        return []
    with writing(path):
        os.unlink(path)
    return [path]


@contextmanager
def writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise errors.OutputFailed(path=e.filename or path, reason=e.strerror or str(e)) from None
