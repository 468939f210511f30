"""Hooks of other packages around the verbs, as OpenStack has them: an entry point, a class with `pre` and `post`.

An entry point of group `libvirt_cbt.hooks` is called as a verb and names a class, which is made once.
https://docs.openstack.org/nova/pike/_modules/nova/hooks.html was the model: `pre(*args, **kwargs)` is called with what
the verb is called with, `post(result, *args, **kwargs)` when it has succeeded, in the other order.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any, Callable, Final, List, NamedTuple, Optional, Tuple

from libvirt_cbt import errors, names

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "libvirt_cbt.hooks"
METADATA: Final = (".dist-info", ".egg-info")


class Hook(NamedTuple):
    """One entry point; `hook` is None for one that cannot be loaded, and `detail` says why."""

    verb: str
    detail: str
    hook: Optional[Any]


def around(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with the hooks of its name around it; itself where there are none."""
    found = [hook for hook in installed() if hook.verb == verb]
    return _wrapped(function, found) if found else function


def _wrapped(function: Callable[..., Any], hooks: List[Hook]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        note = args[0].watch.note if args and hasattr(args[0], "watch") else _silent
        for hook in hooks:
            _called(hook, "pre", note, *args, **kwargs)
        result = function(*args, **kwargs)
        for hook in reversed(hooks):
            _called(hook, "post", note, result, *args, **kwargs)
        return result

    return call


def _called(hook: Hook, when: str, note: Callable[[str], None], *args: Any, **kwargs: Any) -> None:
    """A hook that fails is noted.  Errors: a CbtError that `pre` raises, HookStopped above all, stops the verb."""
    if hook.hook is None:
        if when == "pre":
            note(f"hook {hook.detail}")
        return
    method = getattr(hook.hook, when, None)
    if method is None:
        return
    try:
        method(*args, **kwargs)
    except errors.CbtError as e:
        if when == "pre":
            raise
        note(f"hook {hook.detail}: {e}")
    except Exception as e:  # noqa: BLE001 -- other people's code
        note(f"hook {hook.detail}: {when}: {type(e).__name__}: {names.printable(str(e))}")


def _silent(_: str) -> None:
    """Nobody listens."""


@functools.cache
def installed() -> Tuple[Hook, ...]:
    """Every hook that is installed, in the order of their verbs and names."""
    if not any(map(_mentioned, sys.path)):
        return ()
    from importlib import metadata  # 25 ms

    if sys.version_info >= (3, 10):
        points = tuple(metadata.entry_points(group=GROUP))
    else:
        points = tuple(metadata.entry_points().get(GROUP, ()))
    return tuple(map(_loaded, sorted(set(points), key=lambda point: (point.name, point.value))))


def _loaded(point: EntryPoint) -> Hook:
    try:
        return Hook(point.name, point.value, point.load()())
    except Exception as e:  # noqa: BLE001 -- other people's code
        reason = f"{type(e).__name__}: {names.printable(str(e))}"
        return Hook(point.name, f"{point.value} cannot be loaded: {reason}", None)


def _mentioned(folder: str) -> bool:
    """Whether a package in a folder of sys.path has hooks: asked first, as the metadata of all takes many times as long."""
    try:
        with os.scandir(folder or ".") as entries:
            found = [entry.path for entry in entries if entry.name.endswith(METADATA)]
    except OSError:
        return False
    for path in found:
        try:
            with open(os.path.join(path, "entry_points.txt"), "rb") as file:
                if GROUP.encode() in file.read():
                    return True
        except OSError:
            continue
    return False
