from __future__ import annotations

import random
import string

import pytest

from libvirt_cbt import errors, names


@pytest.mark.parametrize("text", ["vda", "sdz", "hda1", "ubd_0", "a" * 32])
def test_target_accepts(text: str) -> None:
    assert names.target(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", "../x", "vda/", "-rf", "vda\n", "a" * 33, "vd a", "vda\0", "é"])
def test_target_refuses(text: str) -> None:
    with pytest.raises(errors.Usage):
        names.target(text)


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "G" * 16, "A" * 16, "0" * 16 + "\n", "../../../../etc/"])
def test_backup_id_refuses(text: str) -> None:
    with pytest.raises(errors.Usage):
        names.backup_id(text)


def test_new_backup_ids_are_ids_and_differ() -> None:
    made = [names.new_backup_id() for _ in range(100)]
    assert [names.backup_id(i) for i in made] == made
    assert len(set(made)) == 100


def test_domain_uuid_is_canonical() -> None:
    want = "0123abcd-0123-4567-89ab-0123456789ab"
    assert names.domain_uuid(want.upper()) == want
    assert names.domain_uuid(want.replace("-", "")) == want
    with pytest.raises(errors.Usage):
        names.domain_uuid("..")


def test_printable_has_no_control_characters() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rnd = random.Random(seed)
    for _ in range(200):
        text = "".join(chr(rnd.choice([rnd.randrange(128), rnd.randrange(0x110000)])) for _ in range(40))
        shown = names.printable(text)
        assert shown.isprintable()
        shown.encode()  # a lone surrogate would not
    assert names.printable(string.ascii_letters, 5) == "abcde..."
