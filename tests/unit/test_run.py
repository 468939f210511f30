"""What `run` does around its verbs: processes side by side, notes of what failed, and which backups are re-read."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from libvirt_cbt import config, durable, errors, names
from libvirt_cbt.actions import fleet, policies, results, run, several
from libvirt_cbt.repository import checked, outcomes, runs, store
from tests.unit import repository_samples as samples

NOW = datetime.now(timezone.utc)


@pytest.fixture
def kept(tmp_path: Path) -> store.DomainStore:
    found = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    with found.lock():
        pass
    return found


def again(kept: store.DomainStore) -> store.DomainStore:
    return kept.repository.domain(kept.uuid)


# Processes


def task(name: str, place: config.Place, program: str) -> several.Task:
    chosen = policies.Chosen(place, name, samples.UUID, "all", config.Rules(), None)
    return several.Task(chosen, [sys.executable, "-c", program])


COUNTING = """
import os, sys, time
here = {folder!r}
mine = os.path.join(here, {name!r})
open(mine + ".on", "w").close()
until = time.monotonic() + ({patience} or 0.2)
while True:
    time.sleep(0.02)
    seen = [f for f in os.listdir(here) if f.endswith(".on") and f.startswith({host!r})]
    if time.monotonic() > until or ({patience} and len(seen) > 1):
        break
whole = [f for f in os.listdir(here) if f.endswith(".on")]
open(mine + ".seen", "w").write(str(len(seen)))
open(mine + ".whole", "w").write(str(len(whole)))
os.unlink(mine + ".on")
print("{{}}")
"""


def counted(folder: Path, host: str, jobs: int, count: int) -> List[several.Task]:
    place = config.Place(host, None, jobs)
    names_ = [f"{host}{n}" for n in range(count)]
    patience = 30 if jobs > 1 else 0  # of the first, for the second to be seen beside it
    return [
        task(n, place, COUNTING.format(folder=str(folder), name=n, host=host, patience=patience * n.endswith("0")))
        for n in names_
    ]


def test_no_host_has_more_than_its_jobs_and_all_no_more_than_the_total(tmp_path: Path) -> None:
    tasks = [*counted(tmp_path, "a", 2, 4), *counted(tmp_path, "b", 1, 2), *counted(tmp_path, "c", 3, 3)]
    ended = list(several.run(tasks, 4, lambda: None))
    assert sorted(e.task.chosen.name for e in ended) == sorted(t.chosen.name for t in tasks)
    seen: Dict[str, List[int]] = {"a": [], "b": [], "c": []}
    for path in tmp_path.glob("*.seen"):
        seen[path.name[0]].append(int(path.read_text()))
    assert max(seen["a"]) == 2 and max(seen["b"]) == 1 and 2 <= max(seen["c"]) <= 3
    assert max(int(path.read_text()) for path in tmp_path.glob("*.whole")) <= 4


def test_how_a_process_ended_is_told(tmp_path: Path) -> None:
    place = config.Place("", None, 4)
    tasks = [
        task("good", place, 'print(\'{"results": [], "error": {"code": 11, "kind": "Busy", "message": "so"}}\')'),
        task("mute", place, "raise SystemExit(7)"),
        task("dead", place, "import os; os.kill(os.getpid(), 9)"),
        task("noisy", place, "print('nothing of JSON')"),
        task("odd", place, "print('[1]')"),
    ]
    ended = {one.task.chosen.name: fleet._result(one) for one in several.run(tasks, None, lambda: None)}
    failures = {name: made.failures[0] for name, made in ended.items()}
    assert failures["good"] == results.Failure("run", 11, "Busy", "so")
    for name, how in (("mute", "exit code 7"), ("dead", "signal 9"), ("noisy", "exit code 0"), ("odd", "exit code 0")):
        assert failures[name].kind == "RunEnded" and f"({how})" in failures[name].message
        assert ended[name].code == 20


def test_what_is_stopped_begins_nothing_more_and_is_waited_for(tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    program = f"""
import signal, sys, time
def end(*_):
    open({str(mark)!r}, "a").write("x")
    print("{{}}", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
open({str(tmp_path / "begun")!r}, "w").close()
time.sleep(60)
"""
    place = config.Place("", None, 1)

    def stop() -> None:
        if (tmp_path / "begun").exists():
            raise errors.Interrupted(number=15, signal="SIGTERM")

    going = several.run([task("one", place, program), task("two", place, program)], None, stop)
    ended = [next(going)]
    with pytest.raises(errors.Interrupted):
        next(going)
    assert [(e.task.chosen.name, e.code, e.document) for e in ended] == [("one", 143, {})]
    assert mark.read_text() == "x"


def test_the_code_is_that_of_the_first_failure() -> None:
    def made(code: int, *failures: Any) -> Any:
        return results.Run("d", "u", "", "p", code, None, None, None, list(failures), 1.0)

    failed = results.Failure("prune", 15, "RepositoryFull", "no room")
    found = fleet.Fleet([made(0), made(3), made(15, failed), made(11, failed)])
    assert found.code == 15
    assert found.error and found.error.document()["kind"] == "RepositoryFull"
    assert fleet.Fleet([made(0), made(3)]).code == 3
    assert fleet.Fleet([made(0), made(3)]).error is None
    gone = errors.NoHypervisor(uri="x", reason="y")
    assert fleet.Fleet([made(15, failed)], [("h", gone)]).error is gone


def test_two_runs_of_the_same_hosts_do_not_overlap(kept: store.DomainStore) -> None:
    with runs.alone(kept.repository, ["a", "b"]):
        with pytest.raises(errors.RunBusy, match=f"process {os.getpid()}"), runs.alone(kept.repository, ["b", "a"]):
            pass
        with runs.alone(kept.repository, ["c"]):
            pass
    with runs.alone(kept.repository, ["a", "b"]):
        pass


def test_how_a_run_ended_is_noted(kept: store.DomainStore) -> None:
    gone = runs.host_failure("h", errors.NoHypervisor(uri="x", reason="y\x1b"))
    runs.record(kept.repository, ["x"], started=NOW, code=20, domains=0, failed=[], host_failures=[gone])
    runs.record(kept.repository, ["x"], started=NOW, code=20, domains=1, failed=[samples.UUID], host_failures=[gone])
    (found,) = runs.last(kept.repository)
    assert (found.code, found.failed, found.host_failures[0].code) == (20, [samples.UUID], 20)
    assert [u for u in kept.repository.uuids()] == [samples.UUID]  # noqa: C416 -- the notes are no domains
    Path(kept.repository.path, f"run-{runs.key(['x'])}.json").write_text("{}")
    assert runs.last(kept.repository) == []


# Notes


def test_a_failure_counts_until_a_later_backup(kept: store.DomainStore) -> None:
    error = errors.SourceLost(target="vda", reason="gone\n\x1b[2J")
    with pytest.raises(errors.SourceLost), outcomes.noted(kept, "backup"), kept.lock():
        raise error
    noted = outcomes.failing(kept)["backup"]
    assert (noted.code, noted.kind, noted.newest) == (13, "SourceLost", 0)
    assert noted.message.isprintable()
    with kept.lock():
        samples.publish(kept)
    assert outcomes.failing(again(kept)) == {}
    outcomes.failed(kept, "backup", ValueError("a bug"))
    noted = outcomes.failing(again(kept))["backup"]
    assert (noted.code, noted.kind, noted.newest) == (70, "ValueError", 1)


def test_a_success_is_noted_where_it_is_news(kept: store.DomainStore) -> None:
    path = Path(kept.path, outcomes.FILE)
    with outcomes.noted(kept, "prune"):
        pass
    assert not path.exists()
    outcomes.failed(kept, "prune", errors.Busy(reason="so"))
    assert list(outcomes.failing(kept)) == ["prune"]
    with outcomes.noted(kept, "prune"):
        pass
    assert outcomes.failing(kept) == {} and outcomes.read(kept)["prune"].code == 0
    with outcomes.noted(kept, "backup", "audit"):
        pass
    assert outcomes.read(kept)["audit"].code == 0


def test_a_slip_of_the_pen_is_no_failure_of_a_backup(kept: store.DomainStore) -> None:
    for error in (errors.Usage(reason="x"), errors.NoSuchDisk(domain="d", target="t", known="")):
        with pytest.raises(errors.CbtError), outcomes.noted(kept, "backup"):
            raise error
    assert outcomes.read(kept) == {}


def test_what_cannot_be_noted_stops_nothing(kept: store.DomainStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept.lock():  # somebody else is at work
        outcomes.failed(again(kept), "backup", errors.Busy(reason="x"))
    assert outcomes.read(kept) == {}
    Path(kept.path, outcomes.FILE).write_text("not JSON")
    with pytest.raises(errors.Damaged):
        outcomes.read(kept)
    outcomes.failed(kept, "backup", errors.Busy(reason="x"))
    assert outcomes.read(kept)["backup"].code == 11
    monkeypatch.setattr(durable, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    outcomes.failed(kept, "verify", errors.Busy(reason="x"))
    assert list(outcomes.read(kept)) == ["backup"]


def test_a_note_of_another_domain_is_damage(kept: store.DomainStore) -> None:
    outcomes.failed(kept, "backup", errors.Busy(reason="x"))
    other = kept.repository.domain(names.domain_uuid("0123abcd-0123-4567-89ab-0123456789ac"))
    with other.lock():
        pass
    for module, file in ((outcomes, outcomes.FILE), (checked, checked.FILE)):
        if module is checked:
            with kept.lock():
                made = samples.publish(kept)
            checked.record(kept, {made.id: 0})
        os.rename(os.path.join(kept.path, file), os.path.join(other.path, file))
    with pytest.raises(errors.Damaged, match="another domain"):
        outcomes.read(other)
    with pytest.raises(errors.Damaged, match="another domain"):
        checked.states(other)


# Which backups are re-read


def test_in_time_every_backup_comes_round(kept: store.DomainStore) -> None:
    with kept.lock():
        made = [samples.publish(kept).id for _ in range(7)]
    seen: List[str] = []
    for _ in range(3):
        sample = checked.longest_unread(again(kept), 2)
        assert sample[0] == made[-1] and len(sample) == 3
        seen += sample[1:]
        assert checked.record(kept, dict.fromkeys(sample, 0)) is None
        time.sleep(0.002)  # times are noted to the millisecond
    assert sorted(seen) == sorted(made[:-1])
    assert checked.longest_unread(again(kept), 1) == [made[-1], seen[0]]
    assert checked.longest_unread(again(kept), 100)[1:] == seen
    assert checked.longest_unread(again(kept), 0) == [made[-1]]


def test_a_layer_that_changed_since_is_not_known_to_be_good(kept: store.DomainStore) -> None:
    with kept.lock():
        made = [samples.publish(kept).id for _ in range(2)]
    checked.record(kept, {made[0]: 0, made[1]: 2})
    first, second = checked.states(again(kept))
    assert first.time and second.time and (first.damage, second.damage) == (0, 2)
    later = time.time() + 5
    os.utime(os.path.join(kept.directory(made[0]), "layers.json"), (later, later))
    first = checked.states(again(kept))[0]
    assert first.time is None and first.since == checked.moment(samples.TIME)


def test_readings_of_what_was_removed_are_dropped(kept: store.DomainStore) -> None:
    with kept.lock():
        made = samples.publish(kept)
    checked.record(kept, {made.id: 0, "0" * 16: 3})
    assert list(checked._read(kept)) == [made.id]


def test_a_damaged_note_of_readings_begins_anew(kept: store.DomainStore) -> None:
    with kept.lock():
        made = samples.publish(kept)
    Path(kept.path, checked.FILE).write_text(json.dumps({"x": 1}))
    assert checked.longest_unread(again(kept), 1) == [made.id]
    assert checked.record(kept, {made.id: 0}) is None
    assert [s.backup for s in checked.states(again(kept)) if s.time] == [made.id]


@pytest.mark.parametrize(
    ("hours", "every", "wanted"),
    [(None, 3600.0, False), (2.0, None, False), (2.0, 3600.0, True), (0.5, 3600.0, False), (1.0, 3600.0, True), (-5.0, 3600.0, False)],
)
def test_what_is_due(hours: Optional[float], every: Optional[float], wanted: bool) -> None:
    assert run.due(None if hours is None else NOW - timedelta(hours=hours), every, NOW) is wanted
