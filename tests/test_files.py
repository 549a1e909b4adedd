import errno
import os
import stat

import pytest
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.files import path_inside, sha256_of_file, write_atomically


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with write_atomically(target) as temporary:
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
    assert target.read_text() == "second"
    assert names_in(target.parent) == ["a.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), write_atomically(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"disk full while writing .*a\.txt: free some space"),
        (errno.EROFS, r"cannot write .*a\.txt: .*choose a folder you may write to"),
        (errno.EIO, r"cannot write .*a\.txt: .*check the path and the disk"),
    ],
)
def test_a_full_or_broken_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch, number, message):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SafetyExpertsError, match=message) as error, write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
    assert "\n" not in str(error.value) and names_in(tmp_path) == []


def test_written_files_have_the_rights_of_ordinary_files(tmp_path):
    with write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    (tmp_path / "b.txt").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["../a", "x/../../a", "/etc/passwd"])
def test_a_path_that_leaves_its_folder_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="leaves the folder"):
        path_inside(tmp_path / "root", name)


def test_a_link_out_of_the_folder_is_refused_and_names_inside_are_fine(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leaves the folder"):
        path_inside(root, "out/secret")
    assert path_inside(root, "sub/../a.png") == root.resolve() / "a.png"


def test_sha256_is_that_of_the_bytes_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_of_file(tmp_path / "abc") == expected
    with pytest.raises(InputError, match=r"no such file: .*missing"):
        sha256_of_file(tmp_path / "missing")
