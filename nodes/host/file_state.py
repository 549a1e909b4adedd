"""What a file is known by, so that a node runs again when somebody changed it."""

from pathlib import Path


def file_state(path: Path) -> str:
    """Return a value that changes when a file is replaced or edited; "absent" when it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_mtime_ns}-{stat.st_size}"
