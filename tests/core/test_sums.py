"""Check sums: what they find, and in which files."""

import json
import os
import re

import pytest

from paceline.sums import SUMS, find_damage, write_sums


@pytest.fixture
def saved(tmp_path):
    """A folder with files in it and below, and their sums."""
    (tmp_path / "below").mkdir()
    for name, size in (("a.pt", 3 << 20), ("b.json", 7), ("empty", 0), ("below/c.pt", 100)):
        (tmp_path / name).write_bytes(os.urandom(size))
    write_sums(tmp_path)
    return tmp_path


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_every_flipped_bit_is_found_and_its_file_named(saved):
    assert find_damage(saved) is None
    for name in ("a.pt", "b.json", "below/c.pt"):
        file = saved / name
        bits = 8 * file.stat().st_size
        for bit in {0, bits - 1, *range(7, bits, 1 + bits // 10)}:
            flip(file, bit)
            assert (
                find_damage(saved) == f"{file} is damaged: it does not have its check sum in {SUMS}"
            )
            assert bool(find_damage(file)) is (file.parent == saved)
            flip(file, bit)
        assert find_damage(saved) is None


def test_cut_grown_swapped_and_missing_files_are_found(saved):
    file = saved / "a.pt"
    data = file.read_bytes()
    for other in (data[:-1], data + b"\0", b"", data[1 << 20 :] + data[: 1 << 20]):
        file.write_bytes(other)
        assert "a.pt is damaged" in find_damage(saved)
    file.unlink()
    assert find_damage(saved) == f"{file} is missing"
    file.mkdir()
    assert find_damage(saved) == f"{file} cannot be read: Is a directory"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"crc32": 3}', b"\xff"])
def test_sums_that_are_damaged_are_found(saved, text):
    (saved / SUMS).write_bytes(text)
    assert find_damage(saved) == f"{saved / SUMS} is damaged: it holds no check sums"


def test_what_is_not_looked_at(saved):
    flip(saved / "a.pt", 0)
    assert find_damage(saved / "b.json") is None
    assert find_damage(saved, ["*.pt"]) is None
    (saved / "more").touch()  # made later
    assert find_damage(saved, ["a*"]) is None
    (saved / SUMS).unlink()
    assert find_damage(saved) is None
    assert find_damage(saved / "nowhere") is None
    assert find_damage(saved / ("x" * 300)) is None


def test_a_model_card_may_be_edited(tmp_path):
    for folder in (tmp_path, tmp_path / "below"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("one")
    write_sums(tmp_path)
    for folder in (tmp_path, tmp_path / "below"):
        (folder / "README.md").write_text("another")
    assert find_damage(tmp_path) is None


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "below", "x\0", "x" * 999])
def test_names_of_what_is_no_file(name, tmp_path):
    """A device that never ends would be read for ever."""
    (tmp_path / "below").mkdir()
    (tmp_path / SUMS).write_text(json.dumps({"crc32": {name: "00000000"}}))
    assert re.search("it names|cannot be read", find_damage(tmp_path))
