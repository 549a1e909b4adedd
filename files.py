"""Writing so that nothing half-written stays, reading only inside the folder that was meant."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, SafetyExpertsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` on success, remove it on any failure.

    Args:
        sync: wait until the disk has it; False for the one of many that are synced together.

    Raises:
        SafetyExpertsError: the disk is full or the folder cannot be written to.
    """
    target = Path(path)
    temporary = None
    held = contextlib.ExitStack()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: Pillow and others choose the format by it.
        handle, name = tempfile.mkstemp(prefix=_leftover_prefix(target), suffix=target.suffix, dir=target.parent)
        temporary = Path(name)
        held.callback(_let_go, _hold(handle))
        yield temporary
        if sync:
            sync_file(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files only the owner can read
        os.replace(temporary, target)
    except OSError as error:
        raise _as_user_error(error, target) from error
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # so the safetensors library puts an OSError
            raise _as_user_error(OSError(int(found[1]), os.strerror(int(found[1]))), target) from error
        raise
    finally:
        held.close()
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def append_text(path: str | os.PathLike, text: str) -> None:
    """Add `text` as it is to the end of a file.

    Raises:
        SafetyExpertsError: the disk is full or the file cannot be written to.
    """
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise _as_user_error(error, Path(path)) from error


def refuse_link(path: str | os.PathLike) -> None:
    """Raise an InputError where `path`, which a stranger's folder may hold, is a link (or a Windows junction)."""
    path = Path(path)
    if path.is_symlink() or (hasattr(path, "is_junction") and path.is_junction()):
        raise InputError(f"{path} is a link; put the file or folder itself in its place")


def open_plain(path: str | os.PathLike, mode: str = "rb", *, follow_links: bool = False) -> BinaryIO:
    """Open a file of a folder that a stranger may have made: never through a link, never a pipe or a device.

    Args:
        mode: "rb", or "ab", which makes the file where there is none.
        follow_links: for a file that the user named, which may well be a link.

    Raises:
        InputError: `path` is a link, a folder, or no ordinary file.
        OSError: as from `open`.
    """
    if not follow_links:
        refuse_link(path)  # where the system has no O_NOFOLLOW this look beforehand has to do
    flags = os.O_RDONLY if mode == "rb" else os.O_RDWR | os.O_CREAT | os.O_APPEND
    for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC", *(() if follow_links else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a file; check the name") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # became a link just now; a pipe nobody reads
            raise InputError(f"{path} is not an ordinary file; put the file itself in its place") from None
        raise
    mode_bits = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode_bits):
        os.close(descriptor)
        if stat.S_ISDIR(mode_bits):
            raise InputError(f"{path} is a folder, not a file; check the name")
        raise InputError(f"{path} is not an ordinary file; put the file itself in its place")
    return os.fdopen(descriptor, mode)  # type: ignore[return-value]


def read_text(path: str | os.PathLike) -> str:
    """Read a UTF-8 text file that the user named, a byte order mark left out and line breaks as they are.

    Raises:
        InputError: there is no such file, it cannot be read, or is not UTF-8.
    """
    try:
        with open_plain(path, follow_links=True) as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; check the name") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the name and its rights") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except ValueError:  # a NUL in the name
        raise InputError("a file name holds a NUL character; check the name") from None


def check_usable(path: str | os.PathLike) -> None:
    """Raise an InputError where a name the user gave cannot be one: NUL, too long, links in a circle, no access."""
    try:
        Path(path).stat()
    except FileNotFoundError:
        pass
    except ValueError:
        raise InputError("a name holds a NUL character; check it") from None
    except OSError as error:
        raise InputError(f"cannot use {path}: {error.strerror or error}; choose another name") from None


def read_stored(path: Path) -> bytes:
    """Return the bytes of an image of a dataset; a link or a pipe is refused.

    Raises:
        InputError: it is missing, too, or not an ordinary file.
    """
    try:
        with open_plain(path) as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: the image is missing; put it back, or drop its pair") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check its folder and its rights") from None


def sync_file(path: str | os.PathLike) -> None:
    """Wait until the disk has what was written to a file."""
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def sync_folder(folder: str | os.PathLike) -> None:
    """Make names written to a folder survive a power cut. Windows cannot open folders, and needs it less."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what a `write_atomically(path)` left that was killed in the middle; what is being written now stays."""
    target = Path(path)
    with contextlib.suppress(OSError):  # the folder is not there, or not ours to clean
        prefix, suffix = glob.escape(_leftover_prefix(target)), glob.escape(target.suffix)
        for leftover in target.parent.glob(f"{prefix}????????{suffix}"):
            handle = os.open(leftover, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            free = _hold(handle)
            try:
                if free is not None or fcntl is None:
                    leftover.unlink(missing_ok=True)
            finally:
                _let_go(free)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike) -> Iterator[None]:
    """Inside, no other process of this user may enter for the same path. Nothing stays beside the file.

    Raises:
        InputError: another process is inside.
    """
    from filelock import FileLock, Timeout

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:32]
    lock = FileLock(cache / "safety-experts" / "locks" / f"{name}.lock", timeout=0)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is working on {path}; wait for it, or choose another name") from None
    except (OSError, NotImplementedError):  # a read-only home or a drive without locks: work all the same
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _leftover_prefix(target: Path) -> str:
    return f".{target.stem.encode()[:40].decode(errors='ignore')}-"


def _hold(handle: int) -> int | None:
    """Lock an open file until `_let_go`; None when another process holds it. The kernel lets go of a killed one's.

    Windows cannot rename an open file, but does not remove one that is open either: there the handle is closed.
    """
    if fcntl is None:
        os.close(handle)
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a network drive without locks
        pass
    return handle


def _let_go(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _as_user_error(error: OSError, target: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SafetyExpertsError(f"disk full while writing {target}: free some space or choose another folder")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return SafetyExpertsError(f"cannot write {target}: {error.strerror}; choose a folder you may write to")
    return SafetyExpertsError(f"cannot write {target}: {error.strerror or error}; check the path and the disk")


def sha256_of_file(path: str | os.PathLike, *, follow_links: bool = True) -> str:
    """Return the lower-case hex sha256 of a file's bytes.

    Args:
        follow_links: False for a file of a folder that a stranger may have made.

    Raises:
        InputError: there is no such file, or it is no ordinary one.
    """
    try:
        with open_plain(path, follow_links=follow_links) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}; check the name") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check its folder and its rights") from error
    return digest.hexdigest()


def is_plain_name(name: str) -> bool:
    """Say whether a name from a file or a request is that of a file in a folder, on any system, and no path."""
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0") and len(name.encode()) < 200


def path_inside(folder: str | os.PathLike, relative: str) -> Path:
    """Join `relative` (from a workflow, a request or a data file) to `folder`, refusing to leave it.

    Raises:
        InputError: the result lies outside `folder`, also by way of links.
    """
    try:
        root = Path(folder).resolve()
        joined = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that is too long, a NUL
        raise InputError(f"a name inside {folder} cannot be used: too long, or links in a circle") from None
    if not joined.is_relative_to(root):
        raise InputError(f"{relative!r} leaves the folder {root}; use a name inside it")
    return joined
