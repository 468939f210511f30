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

from libvirt_cbt import cli, names
from libvirt_cbt.repository import manifest, store, verified
from tests.unit.report_samples import History

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
WIDTHS: Final = {"narrow": (390, 6400), "wide": (1400, 4200)}
THEMES: Final = ("light", "dark")


def sample(folder: str) -> store.Repository:
    """A year of one guest, a week of another that complains, and one that nothing is known of."""
    rng, now = random.Random(7), datetime.now(timezone.utc)
    repository = store.Repository.init(os.path.join(folder, "backups"))
    year = repository.domain(names.DomainUuid("00000001-0123-4567-89ab-0123456789ab"))
    week = repository.domain(names.DomainUuid("00000002-0123-4567-89ab-0123456789ab"))
    for kept in (year, week):
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
    return repository


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
        if cli.exit_code(["-r", repository.path, "-q", "report", "--html", str(page), "--force"]):
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
