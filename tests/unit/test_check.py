"""What `check` and `metrics` say of repositories in every state."""

from __future__ import annotations

import json
import os
import re
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from prometheus_client import parser

import libvirt_cbt
from libvirt_cbt import cli, config, errors, names
from libvirt_cbt.actions import check, health, metrics
from libvirt_cbt.repository import checked, outcomes, runs, store
from tests.unit import repository_samples as samples

OTHER = names.domain_uuid("0123abcd-0123-4567-89ab-0123456789ac")
MADE = checked.moment(samples.TIME)
HOUR = timedelta(hours=1)


@pytest.fixture
def repository(tmp_path: Path) -> store.Repository:
    return store.Repository.init(str(tmp_path / "repo"))


@pytest.fixture(autouse=True)
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MADE
    monkeypatch.setattr(health, "now", lambda: MADE + HOUR)


def add(repository: store.Repository, uuid: names.DomainUuid = samples.UUID, name: str = "web1") -> store.DomainStore:
    kept = repository.domain(uuid)
    with kept.lock():
        samples.publish(kept, name=name)
    return repository.domain(uuid)


def found(repository: store.Repository, text: str = "", *domains: str, **limits: float) -> Any:
    folder = Path(repository.path).parent
    (folder / "c.toml").write_text(text)
    with libvirt_cbt.Session(repository=repository.path) as session:
        settings = config.load([str(folder / "c.toml")], given=True)
        return check.check(session, settings, domains, limits={"warning_free": 0.0, "critical_free": 0.0, **limits})


def said(result: Any) -> List[Tuple[str, Any]]:
    return [(one.state, one.domain) for one in result.problems]


def test_all_is_well(repository: store.Repository) -> None:
    add(repository)
    result = found(repository)
    assert (result.state, result.code, result.problems) == ("ok", 0, [])
    (one,) = result.domains
    assert (one.domain, one.age_seconds, one.backups, one.generation) == ("web1", 3600.0, 1, 1)
    assert {f.name: f.value for f in result.figures if f.name != "free"} == {"web1 age": 3600.0, "web1 unread": 3600.0, "web1 failing": 0}


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"warning_age": 3599.0}, 1), ({"critical_age": 3599.0}, 2), ({"warning_age": 3600.0}, 0), ({"warning_age": 0.0}, 0),
     ({"warning_verified": 3599.0}, 1), ({"critical_verified": 3599.0}, 2), ({"warning_free": 100.1}, 1),
     ({"critical_free": 100.1}, 2)],
)  # fmt: skip
def test_limits(repository: store.Repository, limits: Dict[str, Any], code: int) -> None:
    add(repository)
    assert found(repository, **limits).code == code


def test_the_limits_are_those_of_the_policy(repository: store.Repository) -> None:
    add(repository)
    add(repository, OTHER, "db1")
    text = """
        [defaults]
        warning_age = "30min"
        [policy.db]
        match = ["db*"]
        warning_age = "2h"
        critical_age = "50min"
        [policy.none]
        match = ["x*"]
        skip = true
        [policy.all]
        match = ["*"]
    """
    assert said(found(repository, text)) == [("critical", "db1"), ("warning", "web1")]
    assert said(found(repository, text, "web1")) == [("warning", "web1")]
    assert said(found(repository, text.replace('"x*"', '"db*"').replace("[policy.db]", "[policy.z]"), "db1")) == [
        ("critical", "db1")
    ]
    assert said(found(repository, text.replace("[policy.db]\n        match", "[policy.db]\n        skip = true\n        match"))) == [
        ("warning", "web1")
    ]


def test_a_failure_counts_until_something_goes_well(repository: store.Repository) -> None:
    kept = add(repository)
    outcomes.failed(kept, "backup", errors.SourceLost(target="vda", reason="gone"))
    outcomes.failed(kept, "prune", errors.Damaged(path="x", reason="y"))
    result = found(repository)
    assert said(result) == [("critical", "web1"), ("warning", "web1")]
    assert "the last backup failed with 13" in result.problems[1].sentence
    with kept.lock():
        samples.publish(kept, name="web1")
    outcomes.succeeded(kept, "prune")
    assert found(repository).code == 0


def test_damage_is_critical(repository: store.Repository) -> None:
    kept = add(repository)
    checked.record(kept, {kept.generations()[0].id: 2})
    result = found(repository)
    assert said(result) == [("critical", "web1")]
    assert result.domains[0].damage == 2
    assert checked.record(kept, {kept.generations()[0].id: 0}) is None
    assert found(repository).code == 0


def test_what_cannot_be_read_is_critical_and_hides_nothing(repository: store.Repository) -> None:
    kept = add(repository)
    add(repository, OTHER, "db1")
    Path(kept.directory(kept.ids()[0]), "manifest.json").write_text("{}")
    result = found(repository)
    assert (result.code, [p.domain for p in result.problems]) == (2, [samples.UUID])
    assert [d.domain for d in result.domains] == ["db1"]
    for name in (outcomes.FILE, checked.FILE):  # notes that nothing depends on
        Path(repository.path, OTHER, name).write_text("{}")
    assert [d.domain for d in found(repository).domains] == ["db1"]


def test_what_is_not_known_is_unknown(repository: store.Repository, tmp_path: Path) -> None:
    assert said(found(repository, "", "nobody")) == [("unknown", "nobody")]
    with libvirt_cbt.Session(repository=str(tmp_path / "none")) as session:
        result = check.check(session, config.load([]))
    assert (result.code, result.total_bytes) == (3, None)
    place = config.Place("far", "x:///", 1)

    def gone(_: config.Place) -> Any:
        raise errors.NoHypervisor(uri="x:///", reason="gone")

    add(repository)
    with libvirt_cbt.Session(repository=repository.path) as session:
        settings = config.Config(policy={"all": config.Policy(match=["*"], critical_age=60)})
        limits: Dict[str, Any] = {"warning_free": 0.0, "critical_free": 0.0}
        result = check.check(session, settings, limits=limits, places=[place], connect=gone)
    assert said(result) == [("critical", "web1"), ("unknown", None)]  # what is stored is looked at all the same
    assert result.code == 2


def test_a_host_that_did_not_answer_is_a_warning(repository: store.Repository) -> None:
    add(repository)
    failure = runs.host_failure("h", errors.NoHypervisor(uri="x", reason="y"))
    now = datetime.now(timezone.utc)
    runs.record(repository, ["x"], started=now, code=20, domains=0, failed=[], host_failures=[failure])
    assert said(found(repository)) == [("warning", None)]


# The command


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> Tuple[int, List[str]]:
    code = cli.exit_code(list(argv))
    return code, capfd.readouterr().out.splitlines()


FIGURE = re.compile(r"'([^']|'')+'=-?[0-9.]+(s|%)?;[0-9.:]*;[0-9.:]*;0")


def test_the_line_of_a_plugin(repository: store.Repository, capfd: pytest.CaptureFixture[str]) -> None:
    add(repository, name="it's|a=b")
    free = ["--warning-free", "0", "--critical-free", "0"]
    code, lines = run(capfd, "-r", repository.path, "check", *free)
    assert code == 0 and len(lines) == 1
    text, _, figures = lines[0].partition(" | ")
    assert text == "LIBVIRT-CBT OK: 1 domains, the newest backup of each at most 1.0 h old"
    assert [bool(FIGURE.fullmatch(f)) for f in re.findall(r"'(?:[^']|'')+'=\S+", figures)] == [True] * 4
    outcomes.failed(repository.domain(samples.UUID), "prune", errors.Busy(reason="x"))
    failing = [line.split("'it''s_a_b failing'=")[1] for line in (lines[0], run(capfd, "-r", repository.path, "check", *free)[1][0])]
    assert failing == ["0;;;0", "1;;;0"]
    with outcomes.noted(repository.domain(samples.UUID), "prune"):
        pass
    assert "'it''s_a_b age'=3600.0s;93600;180000;0" in figures
    code, lines = run(capfd, "-r", repository.path, "check", "--warning-age", "30min", "--critical-age", "45min", *free)
    assert (code, lines[0].split(" (")[0]) == (2, "LIBVIRT-CBT CRITICAL: it's/a=b: its newest backup is 1.0 h old")
    code, lines = run(capfd, "-r", repository.path, "check", "--warning-free", "101")
    assert code == 3 and len(lines) == 1 and lines[0].startswith("LIBVIRT-CBT UNKNOWN: Invalid value for '--warning-free'")
    code, lines = run(capfd, "-r", "/nonexistent", "check")
    assert code == 3 and lines[0].startswith("LIBVIRT-CBT UNKNOWN: no repository at /nonexistent")
    code, lines = run(capfd, "--config", "/nonexistent", "check")
    assert code == 3 and lines[0].startswith("LIBVIRT-CBT UNKNOWN: /nonexistent: ")
    code, lines = run(capfd, "--config", "/nonexistent", "--json", "check")
    assert (code, json.loads(lines[0])["error"]["kind"]) == (3, "ConfigInvalid")
    code, lines = run(capfd, "--json", "-r", repository.path, "check", "--critical-age", "1s", *free)
    (one,) = json.loads(lines[0])["results"]
    assert (code, one["state"], one["problems"][0]["domain"]) == (2, "critical", "it's|a=b")


# Prometheus


def values(text: str) -> Dict[str, float]:
    """Samples by name and labels, as the exposition format has them."""
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_metrics(repository: store.Repository, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = add(repository, name='a"b\\c')
    outcomes.failed(kept, "prune", errors.Busy(reason="x"))
    broken = add(repository, OTHER, "db1")
    Path(broken.directory(broken.ids()[0]), "manifest.json").write_text("{}")
    now = datetime.now(timezone.utc)
    runs.record(repository, ["x:///", "y:///"], started=now, code=11, domains=2, failed=[samples.UUID], host_failures=[])
    code, lines = run(capfd, "-r", repository.path, "metrics")
    shown = values("\n".join(lines))
    whose = rf'{{domain="a\"b\\c",uuid="{samples.UUID}"'
    assert MADE and code == 0
    assert shown[f"libvirt_cbt_backup_last_success_timestamp_seconds{whose}}}"] == pytest.approx(MADE.timestamp())
    assert shown[f"libvirt_cbt_backups{whose}}}"] == 1
    assert shown[f'libvirt_cbt_failing{whose},work="prune"}}'] == 1
    assert shown[f'libvirt_cbt_failing{whose},work="backup"}}'] == 0
    assert shown[f'libvirt_cbt_last_failure_code{whose},work="prune"}}'] == 11
    assert shown[f'libvirt_cbt_unreadable{{domain="{OTHER}",uuid="{OTHER}"}}'] == 1
    assert shown['libvirt_cbt_run_last_failed{hosts="x:///,y:///"}'] == 1
    assert shown["libvirt_cbt_repository_free_bytes"] <= shown["libvirt_cbt_repository_size_bytes"]
    assert {name.split("{")[0] for name in shown} == {metrics.PREFIX + name for name in metrics.GAUGES}
    families = list(parser.text_string_to_metric_families("\n".join(lines) + "\n"))
    assert {(one.type, bool(one.documentation)) for one in families} == {("gauge", True)}
    samples_ = {(s.name, *s.labels.values()): s.value for one in families for s in one.samples}
    assert len(samples_) == len(shown) and samples_["libvirt_cbt_backups", 'a"b\\c', samples.UUID] == 1
    file = tmp_path / "x.prom"
    for _ in range(2):  # the second over the first
        assert run(capfd, "-r", repository.path, "metrics", "--textfile", str(file)) == (0, [])
    assert set(values(file.read_text())) == set(shown)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_the_text_file_is_replaced_and_nothing_else_is_touched(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("root:x:0:0::/:/bin/sh\n")
    link = tmp_path / "link"
    link.symlink_to(kept)
    for other in (kept, link):  # a slip of the pen, as root
        with pytest.raises(errors.Usage, match=f"{other} is there and holds no metrics of libvirt-cbt; name another"):
            metrics.write(str(other), "new")
    assert link.is_symlink() and kept.read_text().startswith("root")
    link.unlink()
    file = tmp_path / "x.prom"
    file.touch()
    for text in ("# HELP libvirt_cbt_backups Backups\n", "# HELP libvirt_cbt_marks Marks\n"):
        metrics.write(str(file), text)
        assert file.read_text() == text
    with pytest.raises(errors.OutputFailed):
        metrics.write(str(tmp_path / "none" / "x.prom"), "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.Usage):
        metrics.write(str(tmp_path / "folder"), "x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "kept", "x.prom"]
