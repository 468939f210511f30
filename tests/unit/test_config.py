"""The configuration file: what holds for whom, and one sentence for whatever is wrong in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import pytest

from libvirt_cbt import config, errors, places

UUID = "0a1b2c3d-0000-4000-8000-00000000000f"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str, name: str = "libvirt-cbt.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
        return str(path)

    return written


def policy(found: config.Config, name: str, host: str = "", uuid: str = UUID) -> Any:
    return found.policy_of(host, name, uuid)


def test_no_file_is_all_defaults() -> None:
    found = config.load([])
    assert (found.jobs, found.connect, found.policy, found.files) == (2, None, {}, ())
    assert found.rules(None) == config.Rules()
    assert found.places() == [config.Place("", None, 2)]


def test_the_first_policy_that_matches_holds(write: Write) -> None:
    text = f"""
        [policy.none]
        match = ["tmp-*", "{UUID.upper()}"]
        skip = true
        [policy.db]
        match = ["db[0-9]", "db-*"]
        exclude = ["db-test*"]
        [policy.rest]
        match = ["*"]
    """
    found = config.load([write(text)])
    other = UUID.replace("f", "e")
    names = ("tmp-1", "db1", "db-a", "db-test1", "DB1", "db10")
    assert [policy(found, n, uuid=other) for n in names] == ["none", "db", "db", "rest", "rest", "rest"]
    assert policy(found, "db1") == "none"  # by its UUID
    assert found.policy["none"].skip


def test_a_policy_holds_on_its_hosts_only(write: Write) -> None:
    text = """
        jobs = 3
        [host.a1]
        connect = "qemu+ssh://a1/system"
        [host.b1]
        connect = "qemu+ssh://b1/system"
        jobs = 1
        [policy.a]
        match = ["*"]
        hosts = ["a*"]
    """
    found = config.load([write(text)])
    assert (policy(found, "g", "a1"), policy(found, "g", "b1"), policy(found, "g", "")) == ("a", None, None)
    assert [(p.name, p.jobs) for p in found.places()] == [("a1", 3), ("b1", 1)]


def test_a_policy_lies_over_the_defaults(write: Write) -> None:
    text = """
        [defaults]
        keep_daily = 7
        wait = "90s"
        exclude_disks = ["vdb"]
        [policy.p]
        match = ["*"]
        keep_daily = 3
        exclude_disks = []
        bandwidth = "8M"
    """
    rules = config.load([write(text)]).rules("p")
    assert (rules.keep_daily, rules.wait, rules.exclude_disks, rules.bandwidth) == (3, 90.0, [], 8 << 20)
    assert rules.max_chain == 60


def test_the_later_file_lies_over_the_earlier(write: Write) -> None:
    below = write('jobs = 4\nconnect = "a:///"\n[defaults]\nwait = 1\nverify = 0\n[policy.all]\nmatch = ["*"]\n', "below")
    above = write('jobs = 5\n[defaults]\nwait = 2\n[policy.mine]\nmatch = ["m*"]\n', "above")
    found = config.load([below, above])
    assert (found.jobs, found.connect, found.files) == (5, "a:///", (below, above))
    assert (found.rules(None).wait, found.rules(None).verify) == (2.0, 0)
    assert (policy(found, "m1"), policy(found, "x")) == ("mine", "all")


@pytest.mark.parametrize(
    ("value", "wanted"), [(0, 0.0), (1.5, 1.5), ("90s", 90.0), ("30min", 1800.0), ("1.5h", 5400.0), ("2d", 172800.0), ("4w", 2419200.0)]
)
def test_durations(value: Any, wanted: float) -> None:
    assert config.seconds(value) == wanted


@pytest.mark.parametrize("value", ["", "3", "3m", "-1s", "1 h", "h", True, -1, None, [], 1e12, "\u0661s"])
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ValueError, match="no duration"):
        config.seconds(value)


@pytest.mark.parametrize("value", [0, -1, "0", "8m", "8 M", True, None, 1.5, "\u0663K"])
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError, match="no number of bytes"):
        config.size(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repositry = '/a'", "unknown key 'repositry'; did you mean 'repository'?"),
        ("[policy.web]\nmatch = ['*']\nkeep_dayly = 3", "[policy.web] unknown key 'keep_dayly'; did you mean 'keep_daily'?"),
        ("[defaults]\nmatch = ['*']", "[defaults] unknown key 'match'; libvirt-cbt.toml(5) lists the keys"),
        ("[policy.web]\nkeep_daily = 3", "[policy.web] key 'match' is missing"),
        ("[policy.web]\nmatch = []", "[policy.web] match: it is empty"),
        ("[policy.web]\nmatch = 'web'", '[policy.web] match: it is a list, such as ["web*", "db1"]'),
        ("[policy.web]\nmatch = [3]", '[policy.web] match: it is text in quotes, such as "web1"'),
        ("[policy.web]\nmatch = ['*']\nwait = '3x'", '[policy.web] wait: "3x" is no duration such as "90s", "30min", "26h", "2d" or "4w"'),
        ("[defaults]\nkeep_within = ''", "[defaults] keep_within: it is empty"),
        ("[defaults]\nkeep_within = '5x'", '[defaults] keep_within: "5x" is no duration such as 1y5m7d2h (years, months, days, hours)'),
        ("[defaults]\nquiesce = 'maybe'", "[defaults] quiesce: Input should be 'auto', 'agent' or 'none'"),
        ("[host.a]", "[host.a] key 'connect' is missing"),
        ("repository = 'backups'", 'repository: "backups" is no absolute path'),
        ("jobs = 0", "jobs: Input should be greater than or equal to 1"),
        ("jobs = '2'", "jobs: it is a number without quotes, such as 7"),
        ("policy = 'all'", "policy: it is a table for each, such as [policy.web]"),
        ("[policy]\nmatch = ['*']", "[policy] match: it is a table of its own, such as [policy.web] or [defaults]"),
        ("[defaults]\nheal = 'yes'", "[defaults] heal: it is true or false, without quotes"),
        ("jobs = 2\njobs = 3\n", "Cannot overwrite a value (at line 2, column 9)"),
        ("a b", "Expected '=' after a key in a key/value pair (at line 1, column 3)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(write: Write, text: str, said: str) -> None:
    path = write(text)
    with pytest.raises(errors.ConfigInvalid) as caught:
        config.load([path])
    assert str(caught.value) == f"{path}: {said}"
    assert caught.value.code == 2


def test_what_cannot_be_read_is_named(tmp_path: Path, write: Write) -> None:
    for path, said in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(errors.ConfigInvalid, match=said):
            config.load([str(path)])
    broken = Path(write(""))
    broken.write_bytes(b"\xff")
    with pytest.raises(errors.ConfigInvalid, match="not UTF-8"):
        config.load([str(broken)])


def test_a_file_that_others_may_write_is_not_believed(write: Write) -> None:
    path = write("jobs = 3")
    os.chmod(path, 0o664)
    with pytest.raises(errors.ConfigInvalid, match="others may write to it"):
        config.load([path])
    assert config.load([path], given=True).jobs == 3  # whoever names it answers for it


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_not_believed(write: Write) -> None:
    path = write("jobs = 3")
    os.chown(path, 12345, -1)
    with pytest.raises(errors.ConfigInvalid, match="belongs to user 12345"):
        config.load([path])


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "libvirt-cbt.toml"
    assert str(own) not in places.config_files()
    own.touch()
    assert places.config_files()[-1] == str(own)


def test_every_key_is_explained() -> None:
    for model in (config.File, config.Check, config.Host, config.Policy):
        assert all(field.description for field in model.model_fields.values())
