"""The documents given to libvirt against libvirt's own schemas, and a parser that trusts nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from libvirt_cbt import errors, names, xmldoc
from libvirt_cbt.hypervisor import defining, documents, scratch, site
from libvirt_cbt.hypervisor.documents import JobDisk

SCHEMAS = Path("/usr/share/libvirt/schemas")
NAME = names.checkpoint(names.BackupId("0123456789abcdef"))
OLDER = names.checkpoint(names.BackupId("fedcba9876543210"))

# Every kind of disk a job can have: in it or left out, tracked or not, whole or since a checkpoint.
FULL = JobDisk("vda", "/var/scratch/a.qcow2", tracked=True)
INCREMENT = JobDisk("vdb", "/var/scratch/b.qcow2", tracked=True, incremental=OLDER)
UNTRACKED = JobDisk("vdc", "/var/scratch/c.qcow2", tracked=False)
LEFT_OUT = JobDisk("sda", None, tracked=False)
MIXES = [mix for count in (1, 2, 3, 4) for mix in itertools.combinations((FULL, INCREMENT, UNTRACKED, LEFT_OUT), count)]

# What XML can carry at all: no control characters but the white space, no surrogates, no non-characters.
CHARACTERS = st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff")
# A file name or a description as somebody hostile would choose it; the samples are tried first.
HOSTILE = st.one_of(
    st.sampled_from(["'\"<&>", "]]>", "<!-- x -->", "&lt;", "&#10;", "--", "${x}", "é\u202e\U0001f4be"]),
    st.text(CHARACTERS, min_size=1, max_size=60),
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def schema(kind: str) -> etree.RelaxNG:
    path = SCHEMAS / f"{kind}.rng"
    if not path.exists():
        pytest.skip(f"{path} is not installed (package libvirt-daemon or libvirt-common)")
    return etree.RelaxNG(etree.parse(str(path)))


@pytest.fixture(scope="module")
def backups() -> etree.RelaxNG:
    return schema("domainbackup")


@pytest.fixture(scope="module")
def checkpoints() -> etree.RelaxNG:
    return schema("domaincheckpoint")


def valid(text: str, rules: etree.RelaxNG) -> etree._Element:
    root = etree.fromstring(text)
    assert rules.validate(root), f"{rules.error_log}\n{text}"
    assert not list(root.iter(etree.Comment)), "the templates' remarks stay at home"
    return root


def rows(root: etree._Element, *names_of: str) -> List[Tuple[Optional[str], ...]]:
    return [tuple(row.get(n) for n in names_of) for row in root.iterfind("disks/disk")]


def info(description: str = "libvirt-cbt repository=0123456789abcdef") -> documents.CheckpointInfo:
    return documents.CheckpointInfo(NAME, description, parent=OLDER, created=1700000000, disks={})


@pytest.mark.parametrize("disks", MIXES, ids=lambda mix: "+".join(d.target for d in mix))
def test_every_document_is_valid(
    disks: Tuple[JobDisk, ...], backups: etree.RelaxNG, checkpoints: etree.RelaxNG
) -> None:
    """Also with no disk in the job at all: the caller's mistake, but well-formed."""
    valid(documents.backup("/run/cbt/x/nbd.sock", disks), backups)
    valid(documents.checkpoint(NAME, documents.description("0123456789abcdef"), disks), checkpoints)
    valid(documents.redefinition(info(), disks), checkpoints)


def test_a_backup_names_every_disk_as_asked(backups: etree.RelaxNG) -> None:
    """A disk that is not named is silently left out; one with a leftover bitmap of the sample would be refused."""
    root = valid(documents.backup("/run/s", [LEFT_OUT, FULL, INCREMENT]), backups)
    assert root.get("mode") == "pull"
    assert rows(root, "name", "backup", "backupmode", "incremental", "exportname", "exportbitmap") == [
        ("sda", "no", None, None, None, None),
        ("vda", "yes", "full", None, "vda", None),
        ("vdb", "yes", "incremental", OLDER, "vdb", "cbt-vdb"),
    ]
    assert [e.get("file") for e in root.iterfind("disks/disk/scratch")] == [FULL.scratch, INCREMENT.scratch]


def test_a_checkpoint_names_every_disk_as_asked(checkpoints: etree.RelaxNG) -> None:
    root = valid(documents.checkpoint(NAME, "d", [FULL, UNTRACKED, LEFT_OUT]), checkpoints)
    assert rows(root, "name", "checkpoint") == [("vda", "bitmap"), ("vdc", "no"), ("sda", "no")]


def test_a_redefinition_names_each_bitmap_and_no_parent(checkpoints: etree.RelaxNG) -> None:
    """An absent parent is an error of libvirt; a bitmap that is not written out is not looked for."""
    root = valid(documents.redefinition(info(), [FULL, LEFT_OUT]), checkpoints)
    assert rows(root, "name", "bitmap") == [("vda", NAME), ("sda", None)]
    assert root.find("parent") is None
    assert root.findtext("creationTime") == "1700000000"


@FEW
@given(st.lists(HOSTILE, min_size=1, max_size=3))
def test_hostile_paths_come_back_as_they_were(paths: List[str]) -> None:
    disks = [JobDisk(f"vd{n}", f"/scratch/{path}", tracked=True) for n, path in enumerate(paths)]
    job = documents.running_job(documents.backup(f"/run/{paths[0]}", disks))
    assert job.socket == f"/run/{paths[0]}"
    assert [e.scratch for e in job.disks.values()] == [d.scratch for d in disks]
    assert list(job.disks) == [e.export for e in job.disks.values()] == [d.target for d in disks]


@pytest.mark.fault(51)
@FEW
@given(paths=st.lists(HOSTILE, min_size=2, max_size=3))
def test_hostile_paths_add_nothing_to_a_document(paths: List[str], checkpoints: etree.RelaxNG) -> None:
    disks = [JobDisk(f"vd{n}", f"/scratch/{path}", tracked=True) for n, path in enumerate(paths)]
    # Of paths libvirt's schema allows fewer characters than its parser takes (absFilePath in basictypes.rng).
    plain = [JobDisk(d.target, "/scratch/x", tracked=True) for d in disks]
    tree = etree.fromstring(documents.backup(f"/run/{paths[0]}", disks))
    assert [e.tag for e in tree.iter()] == [e.tag for e in etree.fromstring(documents.backup("/run/x", plain)).iter()]
    assert [sorted(e.attrib) for e in tree.iter()] == [
        sorted(e.attrib) for e in etree.fromstring(documents.backup("/run/x", plain)).iter()
    ]
    valid(documents.checkpoint(NAME, paths[1], disks), checkpoints)


@pytest.mark.fault(51)
@FEW
@given(HOSTILE, HOSTILE, HOSTILE)
def test_hostile_names_make_no_other_domain(name: str, path: str, record: str) -> None:
    """`restore --define` and `boot`: whatever the texts are, they come back, and nothing else is in the document."""
    stored = (
        "<domain type='qemu'><name>a</name><memory>1</memory><os><type>hvm</type></os><devices>"
        "<disk type='file'><driver name='qemu' type='raw'/><source file='/a'/><target dev='vda'/></disk></devices></domain>"
    )
    image = defining.Image(f"/images/{path}", "qcow2", (f"/run/{path}", "vda"))
    copy = defining.Copy(name, defining.new_uuid(), {"vda": image}, record=record)
    text, _ = defining.document(stored, copy)
    root = etree.fromstring(text)
    assert root.findtext("name") == name and defining.record(text) == record
    assert [s.get("file") for s in root.iterfind("devices/disk/source")] == [f"/images/{path}"]
    assert [h.get("socket") for h in root.iterfind("devices/disk/backingStore/source/host")] == [f"/run/{path}"]
    assert sorted(child.tag for child in root) == sorted(["name", "memory", "os", "devices", "uuid", "metadata"])
    assert [child.tag for child in root.iterfind("devices/*")] == ["disk"]


@pytest.mark.fault(51)
@pytest.mark.parametrize("bad", ["/scratch/a\x07b", "/scratch/\udcff", "/scratch/\ufffe"])
def test_a_path_that_no_document_can_carry_is_a_sentence(bad: str) -> None:
    with pytest.raises(errors.Usage, match="such characters"):
        scratch.places(site.Here(), names.new_backup_id(), ["vda"], bad)


@FEW
@given(HOSTILE)
def test_hostile_descriptions_come_back_as_they_were(text: str) -> None:
    found = documents.checkpoint_info(documents.checkpoint(NAME, text, [FULL]))
    assert found.description == text.strip()
    again = documents.checkpoint_info(documents.redefinition(info(text), [FULL]))
    assert (again.name, again.description, again.created, again.parent) == (NAME, text.strip(), 1700000000, None)


@pytest.mark.parametrize("bad", ["a\0b", "a\x07b", "a\x1bb", "\ufffe"])
def test_what_xml_cannot_carry_is_refused_not_dropped(bad: str) -> None:
    with pytest.raises(ValueError):
        documents.backup("/run/s", [JobDisk("vda", f"/scratch/{bad}", tracked=True)])


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7", "host.example"])
def test_a_job_by_tcp_has_tls_and_names_with_the_id(address: str, backups: etree.RelaxNG) -> None:
    disks = [JobDisk("vda", f"/scratch/{NAME}/vda.qcow2", tracked=True), LEFT_OUT]
    root = valid(documents.backup(documents.Tcp(address, 10809, "0123456789abcdef-"), disks), backups)
    (server,) = root.findall("server")
    assert dict(server.items()) == {"transport": "tcp", "tls": "yes", "name": address, "port": "10809"}
    assert rows(root, "name", "exportname") == [("vda", "0123456789abcdef-vda"), ("sda", None)]
    job = documents.running_job(etree.tostring(root, encoding="unicode"))
    assert (job.socket, job.address) == ("", f"{address}:10809")


def test_a_job_by_tcp_is_proved_by_its_scratch_files() -> None:
    """An address may be another's by now; whoever has any scratch file elsewhere is not ours."""
    ours, other = f"/scratch/{NAME}/vda.qcow2", f"/scratch/{OLDER}/vda.qcow2"
    for files, proved in (([ours], True), ([ours, other], False), ([other], False), ([], False)):
        disks = [JobDisk(f"vd{n}", path, tracked=True) for n, path in enumerate(files)]
        job = documents.running_job(documents.backup(documents.Tcp("192.0.2.7", 10809, ""), disks))
        assert job.proves("/run/libvirt-cbt/0123456789abcdef/nbd.sock") == proved
    unix = documents.running_job(documents.backup("/run/other", [JobDisk("vda", ours, tracked=True)]))
    assert not unix.proves("/run/libvirt-cbt/0123456789abcdef/nbd.sock")


@pytest.mark.parametrize("qemu_ids", [None, (64055, 109)])
def test_pools_and_volumes(qemu_ids: Optional[Tuple[int, int]]) -> None:
    pool = valid(documents.pool(f"/scratch/a & b/{NAME}", qemu_ids), schema("storagepool"))
    assert (pool.findtext("name"), pool.findtext("target/path")) == (NAME, f"/scratch/a & b/{NAME}")
    assert pool.findtext("target/permissions/mode") == ("0710" if qemu_ids else "0700")
    assert pool.findtext("target/permissions/group") == ("109" if qemu_ids else None)
    volume = valid(documents.volume("/scratch/vda.qcow2", 5 << 20), schema("storagevol"))
    assert (volume.findtext("name"), volume.findtext("capacity")) == ("vda.qcow2", str(5 << 20))


def test_only_our_checkpoints_are_ours() -> None:
    """With this answer a checkpoint may be removed by us."""
    assert documents.repository_of(info()) == "0123456789abcdef"
    for description in ("", "libvirt-cbt", "libvirt-cbt repository=", "libvirt-cbt repository= ", "my own"):
        read = documents.checkpoint_info(documents.checkpoint(NAME, description, [FULL]))
        assert documents.repository_of(read) is None
    foreign = documents.CheckpointInfo("daily", info().description, None, 0, {})
    assert documents.repository_of(foreign) is None


def test_a_running_job_after_a_daemons_restart() -> None:
    """libvirt 9.0 leaves exportname out then; a disk left out is not one of the job."""
    job = documents.running_job(
        "<domainbackup mode='pull'><server transport='unix' socket='/run/s'/><disks>"
        "<disk name='vda' backup='yes' type='file' backupmode='full' index='3'><scratch file='/x'/></disk>"
        "<disk name='vdb' backup='yes' exportname='b' exportbitmap='m' index='-1'/>"
        "<disk name='vdc' backup='no'/></disks></domainbackup>"
    )
    assert job.socket == "/run/s"
    assert job.disks == {
        "vda": documents.Export("vda", None, 3, "/x"),
        "vdb": documents.Export("b", "m", None, ""),
    }
    with pytest.raises(errors.HypervisorError, match="vdc"):
        documents.require(job, "vdc")


def test_a_checkpoints_sizes() -> None:
    """A broken bitmap gives no error there: that disk merely has no size."""
    found = documents.checkpoint_info(
        f"<domaincheckpoint><name>{NAME}</name><parent><name>{OLDER}</name></parent>"
        "<creationTime>12</creationTime><disks><disk name='vda' checkpoint='bitmap' size='65536'/>"
        "<disk name='vdb' checkpoint='bitmap'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )
    assert found.disks == {"vda": 65536, "vdb": None}
    assert (found.parent, found.created, found.description) == (OLDER, 12, "")


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    "doctype",
    [
        "<!DOCTYPE d>",
        "<!DOCTYPE d SYSTEM 'file:///etc/passwd'>",
        "<!DOCTYPE d SYSTEM 'http://127.0.0.1:9/x.dtd'>",
        "<!DOCTYPE d [<!ENTITY e SYSTEM 'SECRET'>]>",
        "<!DOCTYPE d [<!ENTITY % p SYSTEM 'SECRET'> %p;]>",
        "<!DOCTYPE d [<!ENTITY a 'ha'><!ENTITY e '&a;&a;&a;'>]>",
    ],
)
def test_a_doctype_is_refused(tmp_path: Path, doctype: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden treasure")
    use = "&e;" if "ENTITY e" in doctype else ""
    text = f"{doctype.replace('SECRET', secret.as_uri())}<d><socket>{use}</socket></d>"
    for read in (documents.running_job, documents.checkpoint_info):
        with pytest.raises(errors.HypervisorError) as caught:
            read(text)
        assert "treasure" not in caught.value.message


def _bomb(entity: str) -> str:
    """Ten to the twelfth, if anybody counted; `entity` begins a declaration."""
    sign = "&#37;" if "%" in entity else "&"
    doubled = "".join(f'<!ENTITY {entity}a{n + 1} "{f"{sign}a{n};" * 10}">' for n in range(12))
    return f'<!DOCTYPE d [<!ENTITY {entity}a0 "<!-- -->">{doubled}'


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    "text",
    [
        _bomb("") + "]><d>&a12;</d>",
        _bomb("") + "]><d x='&a12;'/>",
        _bomb("% ") + "%a12;]><d/>",  # libxml2 2.9 worked on it for hours
        f"<!DOCTYPE d [<!ENTITY a '{'x' * 100_000}'>]><d>{'&a;' * 30_000}</d>",
        "\ufeff<?xml version='1.0'?>\r\n<!-- <a> --> <?pi ?><!-- - -->\t<!DOCTYPE d><d/>",
        "<!DOCTYPE d [<!ATTLIST d y CDATA 'default'>]><d/>",
        "<?xml version='1.0' encoding='utf-7'?>+ADw-!DOCTYPE d+AD4-<d/>",
    ],
    ids=range(7),
)
def test_a_bomb_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A newer libxml2 would refuse them itself; what names another encoding is read as UTF-8, and so is no DOCTYPE."""
    with pytest.raises(errors.HypervisorError, match=r"DOCTYPE|well-formed"):
        xmldoc.parse(text, "it")
    if "utf-7" not in text:
        monkeypatch.setattr("lxml.etree.fromstring", lambda *_: pytest.fail("it was parsed"))
        with pytest.raises(errors.HypervisorError, match="DOCTYPE"):
            xmldoc.parse(text, "it")


@pytest.mark.parametrize(
    "text",
    [
        "<?xml version='1.0' encoding='utf-16'?><a/>",
        "<!-- <!DOCTYPE d> --><a/>",
        "<?x <!DOCTYPE d> ?><a><!-- <!DOCTYPE d> --><![CDATA[<!DOCTYPE d>]]></a>",
    ],
)
def test_what_only_looks_like_a_doctype_is_none(text: str) -> None:
    assert xmldoc.parse(text, "it").tag == "a"


@pytest.mark.parametrize("text", ["", "<a>", "<a/><b/>", "\0", "<a>&e;</a>", "<a x='1' x='2'/>", "\ud800<a/>"])
def test_what_is_no_xml_is_refused(text: str) -> None:
    with pytest.raises(errors.HypervisorError, match="well-formed"):
        xmldoc.parse(text, "it")


def test_endless_xml_is_refused() -> None:
    with pytest.raises(errors.HypervisorError, match="longer"):
        xmldoc.parse("<a>" + "x" * xmldoc.MAX_BYTES + "</a>", "it")
    with pytest.raises(errors.HypervisorError):
        xmldoc.parse("<a>" * 100000 + "</a>" * 100000, "it")
