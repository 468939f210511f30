"""What happens to files of the repository behind the tool's back."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Callable, Final, Iterator, List, Optional, Set, Tuple

from tests.soak import judge, tool_rules
from tests.soak.model import Chronicle, Made, layered, require
from tests.soak.rules import rule
from tests.soak.world import World

DAMAGED: Final = 16  # the exit code
ASKED: Final = 10  # pairs
FREE: Final = ("protected", "intent.json")  # they are there or not; what is in them says nothing


@rule(5)
def damage(world: World, rng: random.Random) -> Optional[str]:
    """A file is damaged: whoever needs it is refused, all else is right, also what a run makes then.  It is put back."""
    chronicle = world.choose(rng)
    files = _files(world, chronicle)
    if not files:
        return None
    path = rng.choice(files)
    where, good = path.relative_to(chronicle.repository), path.read_bytes()
    bad, how = _damaged(rng, good)
    words = [] if world.busy or world.point or world.staged(chronicle) else _words(world, chronicle, rng)
    if path.name == "manifest.json" and words[:1] != ["prune"]:
        words = []  # numbers and lineages are others then: tests/faults/test_damaged_history.py
    with _undone(world, chronicle, whole=words[:1] == ["prune"]):
        _write(path, bad)
        sound = _sound(world, chronicle, rng)
        seen = _seen(world, chronicle)
        require(seen or len(sound) == len(_backups(chronicle)), "verify does not see why a restore is refused", where)
        require(seen or not _told_of(path, how), "verify does not see damage", f"{where} {how}")
        said = _ran(world, chronicle, words, sound, lambda: _write(path, good))
    return f"{chronicle.name} {how} {where}: {'seen' if seen else 'unseen'}, {len(sound)} sound{said}"


def _files(world: World, chronicle: Chronicle) -> List[Path]:
    found = Path(chronicle.repository, world.guest.uuid, "backups").glob("*/*")
    return sorted(path for path in found if path.name not in FREE)


def _damaged(rng: random.Random, good: bytes) -> Tuple[Optional[bytes], str]:
    """What a file holds then, None for one that is gone, and how that came about."""
    how = rng.choice(("flipped", "flipped", "emptied", "cut", "removed"))
    at = rng.randrange(len(good)) if good else 0
    if how == "removed" or not good:
        return None, "removed"
    if how == "flipped":
        return good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :], f"flipped a bit at {at} of"
    return (good[:at], f"cut at {at}") if how == "cut" else (b"", "emptied")


def _told_of(path: Path, how: str) -> bool:
    """Whether a verify must see it: not every byte of an image means something, and a dead prune may leave files."""
    if path.suffix == ".qcow2":
        return False
    if ".contents." in path.name:
        return f'"{path.name}"' in path.with_name("layers.json").read_text()
    return True


def _write(path: Path, content: Optional[bytes]) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@contextlib.contextmanager
def _undone(world: World, chronicle: Chronicle, *, whole: bool) -> Iterator[None]:
    """With `whole` all files of the guest are put back at the end, as from another copy."""
    held, copy = os.path.join(chronicle.repository, world.guest.uuid), os.path.join(world.folder, "copy")
    if whole:
        shutil.copytree(held, copy)
    yield
    if whole:
        shutil.rmtree(held)
        shutil.move(copy, held)


def _backups(chronicle: Chronicle) -> List[Made]:
    return [made for made in chronicle.made if made.layered]


def _sound(world: World, chronicle: Chronicle, rng: random.Random) -> Set[str]:
    """The backups that restore, to what the guest held; some answers are looked at, too."""
    asked = judge.pairs(chronicle)
    for pair in rng.sample(asked, min(ASKED, len(asked))):
        judge.answer(world, chronicle, *pair, refused=True)
    return {made.id for made in _backups(chronicle) if judge.restored(world, chronicle, made, refused=True)}


def _seen(world: World, chronicle: Chronicle) -> bool:
    ended = world.command(chronicle, "verify")
    require(ended.code in (0, DAMAGED), "verify failed", ended)
    return ended.code == DAMAGED


def _words(world: World, chronicle: Chronicle, rng: random.Random) -> List[str]:
    verb = rng.choice(["", "backup", "mark" if world.guest.tracked() else "", "prune"])
    if verb == "prune":
        return [verb, *tool_rules.prune_options(chronicle, rng)]
    return [verb, *(tool_rules.backup_options(world, rng) if verb == "backup" else [])] if verb else []


def _ran(world: World, chronicle: Chronicle, words: List[str], sound: Set[str], mend: Callable[[], None]) -> str:
    """A run over a damaged file; `mend` puts the file back, unless a prune may have made another of it."""
    if not words:
        mend()
        return ""
    moment = world.moment(chronicle)
    ended = world.command(chronicle, *words)
    require(ended.code in (0, DAMAGED) or ended.kind == "Usage", "a run over damage", ended)
    if words[0] == "prune":
        _unharmed(world, chronicle, sound)
        return f"; {' '.join(words)}: {ended}"
    mend()
    if ended.code == 0:
        tool_rules.taken(world, chronicle, moment, ended)
    else:
        require(world.published(chronicle, moment) is None, "a run that failed has published", ended)
    return f"; {' '.join(words)}: {ended}"


def _unharmed(world: World, chronicle: Chronicle, sound: Set[str]) -> None:
    """A prune has not spread the damage: what was sound and is still there is sound.

    Of a backup that it was to take away it may have taken one disk, and not another that needs what is damaged.
    """
    listed = world.command(chronicle, "list")
    left = {row["id"]: layered(row) for row in listed.result["generations"]}
    hidden = {row["id"] for row in listed.result["unreadable"]}
    for newest in _backups(chronicle)[-1:]:
        if newest.id in hidden:
            held = Path(chronicle.repository, world.guest.uuid, "backups", newest.id)
            left[newest.id] = {path.stem for path in held.glob("*.qcow2")}
        require(left.get(newest.id) == newest.layered, "a prune has taken of the newest backup", listed)
    for made in _backups(chronicle):
        disks = left.get(made.id, set()) if made.id not in hidden else set()
        require(disks <= made.layered, "a prune has added to a backup", made.number)
        if disks:
            shown = replace(made, layered=disks)
            restored = judge.restored(world, chronicle, shown, refused=made.id not in sound)
            require(restored or made.id not in sound, "a prune has spread damage", made.number)
