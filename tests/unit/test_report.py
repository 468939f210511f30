"""The report: what it says, that nothing in it can do harm, how large it gets, and where its file goes."""

from __future__ import annotations

import json
import os
import random
import re
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Iterator, Union

import pytest
from lxml import html

import libvirt_cbt
from libvirt_cbt import cli, errors, names
from libvirt_cbt.actions import report_file
from libvirt_cbt.cli import report_generations, report_page, report_style
from libvirt_cbt.repository import manifest, store, verified
from tests.unit.report_samples import History

NOW = datetime.now(timezone.utc)
HOSTILE = "</title></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\u202e\x07"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Repository:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # a thousand generations would be minutes of it
    return store.Repository.init(str(tmp_path / "repo"))


def domain(repository: store.Repository, number: int = 1) -> store.DomainStore:
    kept = repository.domain(names.DomainUuid(f"{number:08d}-0123-4567-89ab-0123456789ab"))
    with kept.lock():
        return kept


def parsed(page: Union[str, bytes]) -> Any:
    return html.document_fromstring(page)


@pytest.fixture
def session(repository: store.Repository) -> Iterator[libvirt_cbt.Session]:
    with libvirt_cbt.Session(uri="nowhere:///", repository=repository.path) as one:
        yield one


def test_what_it_says(repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random) -> None:
    kept = domain(repository)
    history = History(kept, rng, "web1", ("vda", "vdb"))
    for hours in (96, 72, 48, 24):
        history.add(NOW - timedelta(hours=hours), mark=hours == 48, frozen=None if hours == 72 else float(hours))
    left = manifest.Unprotected(target="sda", reason="a CD-ROM")
    history.add(NOW - timedelta(hours=1), warnings=["scarce"], unprotected=[left])
    assert verified.record(kept, backups=5, checked_bytes=77, damage=0) is None
    found = libvirt_cbt.report(session)
    assert (found.repository, found.id) == (repository.path, repository.id)
    assert 0 < found.free_bytes <= found.total_bytes
    (one,) = found.domains
    assert (one.domain, one.backups, one.marks) == ("web1", 4, 1)
    assert (one.oldest, one.newest) == (one.generations[0].time, one.generations[-1].time)
    since = (datetime.now(timezone.utc) - NOW).total_seconds()  # NOW is when the tests began
    assert one.age_seconds == pytest.approx(3600 + since, abs=60)
    assert one.usual_gap_seconds == pytest.approx(24 * 3600, abs=60)
    assert one.verified and (one.verified.newest, one.verified.backups, one.verified.damage) == (5, 5, 0)
    assert one.attention == ["generation 5: scarce"]  # a CD-ROM never was in a backup
    assert [(d.target, d.chain, d.since) for d in one.disks] == [("vda", 4, 1), ("vdb", 4, 1)]
    heat = one.disks[0].heatmap
    assert heat and [g.generation for g in heat.generations] == [2, 3, 4, 5]
    assert [g.kind for g in one.generations] == ["full", "incremental", "mark", "incremental", "incremental"]
    assert [g.consistent for g in one.generations] == [True, False, True, True, True]
    assert sum(day.backups for day in one.days) == 4 and sum(day.marks for day in one.days) == 1
    assert one.held_bytes == sum(g.held_bytes for g in one.generations) > 0


def test_what_is_to_be_looked_at(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    kept = domain(repository)
    history = History(kept, rng, "late")
    for days in (13, 12, 11, 10):
        history.add(NOW - timedelta(days=days))
    history.disks = ("vdb",)
    history.lineages["vdb"] = names.new_lineage()
    history.parents["vdb"] = None
    history.add(NOW - timedelta(days=9), unprotected=[manifest.Unprotected(target="vda", reason="raw")])
    said = libvirt_cbt.report(session).domains[0].attention
    assert any("late: backups came every 24.0 h" in s for s in said)
    assert "disk vda is not in backups any more: raw" in said
    assert "never verified as a whole" in said
    verified.record(kept, backups=5, checked_bytes=77, damage=3)
    found = libvirt_cbt.report(session)
    assert "the last verification found 3 damaged" in found.domains[0].attention
    assert b'<small class="alarm">3 damaged, up to generation 5</small>' in report_page.page(found)


def test_a_backup_that_became_a_mark(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    kept = domain(repository)
    made = [History(kept, rng, "vm").add(NOW)]
    Path(kept.directory(made[0].id), store.PROTECTED).touch()
    path = os.path.join(kept.directory(made[0].id), "layers.json")
    Path(path).write_bytes(manifest.Layers(backup=made[0].id, disks={}, removed=["vda"]).dump())
    (one,) = libvirt_cbt.report(session).domains
    assert (one.backups, one.marks, one.newest, one.disks[0].chain) == (0, 1, None, 0)
    assert (one.generations[0].kind, one.generations[0].data, one.generations[0].stored_bytes) == ("mark", False, 0)
    assert "no backup holds data" in one.attention
    assert b"mark, protected" in report_page.page(libvirt_cbt.report(session))


def test_damage_stands_in_nobodys_way(
    repository: store.Repository, rng: random.Random, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [domain(repository, n) for n in (1, 2, 3)]
    made = [History(one, rng, f"vm{n}").add(NOW - timedelta(hours=1)) for n, one in enumerate(kept, 1)]
    os.truncate(os.path.join(kept[0].directory(made[0].id), "manifest.json"), 99)
    os.unlink(os.path.join(kept[1].directory(made[1].id), "layers.json"))
    verified.record(kept[2], backups=1, checked_bytes=1, damage=0)
    path = os.path.join(kept[2].path, verified.FILE)
    data = bytearray(Path(path).read_bytes())
    data[20] ^= 1
    Path(path).write_bytes(data)
    page = tmp_path / "page.html"
    assert cli.exit_code(["-r", repository.path, "--json", "report", "--html", str(page)]) == 16
    (found,) = json.loads(capsys.readouterr().out)["results"]
    by_uuid = {one["uuid"]: one for one in found["domains"]}
    assert "is damaged" in by_uuid[kept[0].uuid]["unreadable"]
    assert any("layers.json" in s for s in by_uuid[kept[1].uuid]["attention"])
    assert any("verified.json" in s for s in by_uuid[kept[2].uuid]["attention"])
    assert by_uuid[kept[2].uuid]["verified"] is None and by_uuid[kept[2].uuid]["backups"] == 1
    text = page.read_text(encoding="utf-8")
    assert all(one.uuid in text for one in kept)
    commands = parsed(text).xpath("//ul[@class='alarms']//code/text()")
    assert commands and all(str(one).startswith("libvirt-cbt ") for one in commands) and "`" not in text


def test_nothing_in_it_can_do_harm(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    for number in (1, 2):
        history = History(domain(repository, number), rng, HOSTILE)
        left = manifest.Unprotected(target="sda", reason=HOSTILE)
        for days in (3, 2, 1):
            history.add(NOW - timedelta(days=days), warnings=[HOSTILE], unprotected=[left], reason=HOSTILE)
    for asked in (None, "00000001-0123-4567-89ab-0123456789ab"):
        text = report_page.page(libvirt_cbt.report(session, asked)).decode("utf-8")
        assert text.count("&lt;script&gt;alert(1)") >= 7
        assert "\u202e" not in text and "\x07" not in text
        tree = parsed(text)
        assert not tree.xpath("//script | //img | //link | //iframe | //object | //form | //base | //*[@style]")
        assert [str(a) for a in tree.xpath("//@*") if re.match(r"\s*(javascript|data|https?|//)", str(a))] == []
        assert not [n for n in {str(a.attrname) for a in tree.xpath("//@*")} if n.startswith("on")]
        assert all(str(a).startswith("#d-") for a in tree.xpath("//@href"))
        assert tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content") == [report_page.POLICY]
        assert "url(" not in text and "@import" not in text
        assert len(tree.xpath("//style")) == 1


def test_it_can_be_read_by_ear_and_without_colour(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    for number in (1, 2):
        history = History(domain(repository, number), rng, f"vm{number}")
        for days in range(80, 0, -1):
            history.add(NOW - timedelta(days=days))
    tree = parsed(report_page.page(libvirt_cbt.report(session)))
    assert tree.get("lang") == "en" and len(tree.xpath("//h1")) == 1
    levels = [int(str(h.tag)[1]) for h in tree.xpath("//h1 | //h2 | //h3")]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert all(table.xpath("./caption") for table in tree.xpath("//table"))
    assert all(cell.get("scope") for cell in tree.xpath("//th"))
    assert all(drawing.get("aria-label") and drawing.get("role") == "img" for drawing in tree.xpath("//svg"))
    ids = [str(i) for i in tree.xpath("//@id")]
    assert len(ids) == len(set(ids)) and {str(h)[1:] for h in tree.xpath("//@href")} <= set(ids)


def luminance(colour: str) -> float:
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)] if len(colour) == 7 else [1.0, 1.0, 1.0]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [report_style.LIGHT, report_style.DARK], ids=["light", "dark"])
def test_contrast(theme: str) -> None:
    colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+):(#\w+);", theme)}

    def ratio(one: str, other: str) -> float:
        low, high = sorted((colours[one], colours[other]))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "soft", "link", "alarm"):
        for back in ("page", "card", "track"):
            assert ratio(text, back) >= 4.5, (text, back)
    assert ratio("text", "alarm-back") >= 4.5
    for drawn in ("bar", "ice", "alarm", "text", "h3", "h4", "h5", "h6"):
        assert ratio(drawn, "track") >= 3, drawn
    steps = [colours[f"h{n}"] for n in range(1, 7)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))


def test_many_generations_and_many_domains(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    history = History(domain(repository), rng, "old")
    for number in range(1000):
        history.add(NOW - timedelta(hours=6 * (1000 - number)), full=number % 50 == 0)
    found = libvirt_cbt.report(session)
    page = report_page.page(found)
    assert len(page) < 150_000
    tree = parsed(page)
    assert len(tree.xpath("//tr")) < 200
    many = [found.domains[0]] * 200
    whole = report_page.page(type(found)(**{**vars(found), "domains": many}))
    assert len(whole) < 12_000_000
    assert len(report_page.page(type(found)(**{**vars(found), "domains": []}))) < 20_000


@pytest.mark.parametrize("most", [1, 3, 8, 60])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 61, 1000])
def test_thinning_keeps_both_ends(count: int, most: int) -> None:
    numbers = report_generations.thinned(list(range(count)), most)
    assert len(numbers) == min(count, most) == len(set(numbers))
    assert numbers == sorted(numbers, reverse=True)
    if most > 1:
        assert numbers[0] == count - 1 and numbers[-1] == 0


def test_where_the_file_goes(
    repository: store.Repository, rng: random.Random, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    History(domain(repository), rng, "vm").add(NOW)
    page = tmp_path / "page.html"

    def run(*more: str) -> int:
        return cli.exit_code(["-r", repository.path, "report", "--html", str(page), *more])

    assert run() == 0 and stat.S_IMODE(page.stat().st_mode) == 0o600
    page.chmod(0o644)
    first = page.stat().st_ino
    assert run() == 0  # the night after
    assert stat.S_IMODE(page.stat().st_mode) == 0o644 and page.stat().st_ino != first
    assert os.listdir(tmp_path) in (["page.html", "repo"], ["repo", "page.html"])
    page.write_bytes(b"")  # as mktemp makes it
    assert run() == 0
    page.write_text("mine", encoding="utf-8")
    assert run() == 2 and page.read_text(encoding="utf-8") == "mine"
    assert "--force" in capsys.readouterr().err
    assert run("--force") == 0 and report_file.MARK in page.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(page.read_bytes())
    page.unlink()
    page.symlink_to(other)
    assert run() == 2 and page.is_symlink()
    page.unlink()
    page.mkdir()
    assert run("--force") == 2
    for inside in ("page.html", "repository.json", "00000001-0123-4567-89ab-0123456789ab/backups/x"):
        assert cli.exit_code(["-r", repository.path, "report", "--force", "--html", f"{repository.path}/{inside}"]) == 2
    (tmp_path / "link").symlink_to(repository.path)
    assert cli.exit_code(["-r", repository.path, "report", "--html", str(tmp_path / "link" / "x")]) == 2
    assert cli.exit_code(["-r", repository.path, "report", "--html", str(tmp_path / "none" / "x")]) == 15


def test_a_full_disk_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_bytes(report_file.MARK)

    def full(_fd: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(errors.OutputFailed):
        report_file.replace(str(page), b"new")
    monkeypatch.undo()
    assert page.read_bytes() == report_file.MARK and os.listdir(tmp_path) == ["page.html"]


def test_in_words(repository: store.Repository, rng: random.Random, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(["-r", repository.path, "report"]) == 0
    History(domain(repository), rng, "bad\x1b[31m").add(NOW, warnings=["\x1b[2Jgone"])
    assert cli.exit_code(["-r", repository.path, "report"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "never verified as a whole" in out
    assert cli.exit_code(["-r", repository.path, "report", "nobody"]) == 10
    assert cli.exit_code(["-r", repository.path, "report", "--force"]) == 2


def test_a_verification_is_noted_when_all_was_read(
    repository: store.Repository, session: libvirt_cbt.Session, rng: random.Random
) -> None:
    kept = domain(repository)
    made = History(kept, rng, "vm").add(NOW)
    # Damaged, so that no layer has to be served.
    os.truncate(os.path.join(kept.directory(made.id), "vda.contents.npy"), 0)
    libvirt_cbt.verify(session, "vm", at="1")
    assert verified.last(kept) is None
    libvirt_cbt.verify(session, "vm")
    found = verified.last(kept)
    assert found and (found.newest, found.backups, found.damage > 0) == (1, 1, True)
    assert stat.S_IMODE(os.stat(os.path.join(kept.path, verified.FILE)).st_mode) == 0o600


def test_a_note_of_another_repository(repository: store.Repository, rng: random.Random) -> None:
    kept, other = domain(repository, 1), domain(repository, 2)
    for one in (kept, other):
        History(one, rng, "vm").add(NOW)
    verified.record(kept, backups=1, checked_bytes=1, damage=0)
    os.rename(os.path.join(kept.path, verified.FILE), os.path.join(other.path, verified.FILE))
    with pytest.raises(errors.Damaged):
        verified.last(other)
