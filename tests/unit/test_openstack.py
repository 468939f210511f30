"""OpenStack's names: of an instance in a domain's XML, of a volume as a disk's serial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest
from lxml import etree

from libvirt_cbt import errors, names, openstack
from libvirt_cbt.repository import aliases, manifest, staging, store
from tests.guests import nova
from tests.unit import repository_samples as samples

VOLUME = "a4d3a0a5-3c0f-4f0c-9f52-1c0f8d3a6f6e"


def xml(metadata: str) -> str:
    return f"<domain><name>instance-0000002a</name><metadata>{metadata}</metadata><devices/></domain>"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_instance_in_a_domains_xml(version: str) -> None:
    found = openstack.instance(etree.fromstring(xml("<x xmlns='urn:x'/><!-- c -->" + nova.instance("web & shop", version))))
    assert found == openstack.Instance("web & shop", nova.PROJECT)


@pytest.mark.parametrize(
    "text",
    [
        "<domain/>",
        xml(""),
        xml("<x:instance xmlns:x='urn:other'><x:name>web</x:name></x:instance>"),
        xml(f"<n:instance xmlns:n='{nova.NAMESPACE}1.1'/>"),
        xml(f"<n:port xmlns:n='{nova.NAMESPACE}1.1'><n:name>web</n:name></n:port>"),
        f"<domain>{nova.NAMESPACE}",
        f'<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/hostname">]><d>{nova.NAMESPACE}&x;</d>',
    ],
)
def test_what_is_no_instance_has_no_name(text: str) -> None:
    assert openstack.name(text) is None


@dataclass(frozen=True)
class Disk:
    target: str
    serial: Optional[str]


def test_a_disk_by_its_target_before_its_serial() -> None:
    disks = [Disk("vda", None), Disk("vdb", "vda"), Disk("vdc", VOLUME)]
    assert names.disk(disks, "vda") == disks[0]
    assert names.disk(disks, VOLUME) == disks[2]
    assert names.disk(disks, VOLUME.upper()) is None
    with pytest.raises(errors.Usage, match="vdb, vdc; give a target"):
        names.disk([Disk("vdb", VOLUME), Disk("vdc", VOLUME)], VOLUME)


def published(kept: store.DomainStore, name: str, serial: Optional[str]) -> None:
    """A generation of an instance of nova's."""
    with kept.lock():
        pass
    wanted = samples.intent(kept)
    with staging.begun(kept, wanted) as stage:
        delta = stage.deltas("vda")
        digest, rows = delta.finish()
        one = samples.disk(
            wanted.id, kept.next_generation(), manifest.Delta(digest=digest, extents=rows), None, samples.LINEAGE
        )
        made = samples.record(kept, wanted, kept.next_generation(), one.model_copy(update={"serial": serial, "mode": "mark"}))
        files = {"domain.xml": stage.add("domain.xml", xml(nova.instance(name)).encode())}
        stage.publish(
            made.model_copy(update={"files": files}), manifest.Layers(backup=wanted.id, disks={})
        )


def test_a_stored_instance_by_its_newest_name(tmp_path: Path) -> None:
    repository = store.Repository.init(str(tmp_path / "repo"))
    uuids = [names.domain_uuid(f"0123abcd-0123-4567-89ab-00000000000{n}") for n in range(3)]
    for uuid, name in zip(uuids, ("shop", "mail", "mail")):
        published(repository.domain(uuid), name, None)
    assert aliases.find(repository, "shop").uuid == uuids[0]
    with pytest.raises(errors.Usage, match=f"{uuids[1]}, {uuids[2]}; give a UUID"):
        aliases.find(repository, "mail")
    published(repository.domain(uuids[2]), "mail-old", None)
    assert aliases.find(repository, "mail").uuid == uuids[1]
    with pytest.raises(errors.NotInRepository):
        aliases.find(repository, "web")


def test_a_stored_disk_by_the_newest_generation_that_has_the_serial(tmp_path: Path) -> None:
    kept = store.Repository.init(str(tmp_path / "repo")).domain(samples.UUID)
    published(kept, "shop", VOLUME)
    published(kept, "shop", None)
    assert [aliases.target(kept, asked) for asked in ("vda", VOLUME, "vdz")] == ["vda", "vda", "vdz"]
    assert kept.generations()[0].require(VOLUME).target == "vda"
    with pytest.raises(errors.NoSuchDisk, match=VOLUME):
        kept.generations()[1].require(VOLUME)
