"""`script/look`: pictures of the report in a real browser, light and dark, narrow and wide, for people to look at."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

from libvirt_cbt import cli, errors, names
from libvirt_cbt.repository import manifest, store, verified
from tests.unit.report_samples import History

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
WIDTHS: Final = {"narrow": (390, 10400), "wide": (1400, 7000)}
THEMES: Final = ("light", "dark")


def sample(folder: str) -> store.Repository:
    """A season of one guest, a week of another that complains, a month of one that is damaged, and one that cannot be read."""
    rng, now = random.Random(7), datetime.now(timezone.utc)
    repository = store.Repository.init(os.path.join(folder, "backups"))
    year, week, month, lost = (
        repository.domain(names.DomainUuid(f"0000000{number}-0123-4567-89ab-0123456789ab")) for number in range(1, 5)
    )
    for kept in (year, week, month, lost):
        with kept.lock():
            pass
    history = History(year, rng, "database-of-the-accounting-department", ("vda", "vdb"))
    for day in range(120, 0, -1):
        history.add(now - timedelta(days=day, hours=1), mark=day % 9 == 4, full=day % 40 == 0)
    verified.record(year, backups=100, checked_bytes=77 << 30, damage=0)
    troubled = History(week, rng, "web1")
    for day in range(7, 0, -1):
        troubled.add(
            now - timedelta(days=day),
            frozen=None if day == 3 else 240.0,
            warnings=["disk vda was copied in full: the bitmap of generation 4 is missing"] if day == 2 else [],
            unprotected=[manifest.Unprotected(target="sda", reason="a raw image that several guests share")],
        )
    _damaged(History(month, rng, "mail"), now)
    History(lost, rng, "lost").add(now)
    for one in lost.generations():
        Path(lost.directory(one.id), "manifest.json").write_text("{")
    return repository


def _damaged(history: History, now: datetime) -> None:
    """Its backups are late, some were taken with warnings, one cannot be read, and the last verification is old and bad."""
    kept = history.kept
    said = [
        "the guest agent did not answer in 30 s, so the backup is as after a power failure",
        "disk vda is read by another program: /srv/images/" + "a-long-name-without-a-space" * 4 + ".qcow2",
    ]
    made = [history.add(now - timedelta(days=day), warnings=said if day % 4 == 0 else []) for day in range(40, 9, -1)]
    verified.record(kept, backups=12, checked_bytes=9 << 30, damage=3)
    noted = Path(kept.path, verified.FILE)
    old = (now - timedelta(days=25)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    noted.write_bytes(verified.Verified.load(str(noted)).model_copy(update={"time": old}).dump())
    Path(kept.directory(made[20].id), "manifest.json").write_text("{")


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/look", description=__doc__)
    parser.add_argument("folder", help="where the page and its pictures go")
    folder = Path(parser.parse_args().folder).absolute()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("script/look: no chromium here: script/bootstrap --browser installs it", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    with tempfile.TemporaryDirectory(prefix="cbt-look-") as place:
        repository = sample(place)
        if cli.exit_code(["-r", repository.path, "-q", "report", "--html", str(page), "--force"]) != errors.Damaged.code:
            return 1
        for theme in THEMES:
            for width, (columns, lines) in WIDTHS.items():
                picture = folder / f"{width}-{theme}.png"
                dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
                argv = [
                    browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *dark,
                    f"--user-data-dir={place}/profile", f"--window-size={columns},{lines}", f"--screenshot={picture}",
                    page.as_uri(),
                ]  # fmt: skip
                subprocess.run(argv, check=True, capture_output=True, timeout=120)
                print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
