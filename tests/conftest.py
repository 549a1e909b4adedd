"""Two tiers: without ComfyUI and slow ones in `make check`, everything in `make test`."""

import resource
from pathlib import Path

import pytest

_WITH_COMFYUI = {"comfyui", "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _WITH_COMFYUI & set(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture
def limit_files():
    """Let the kernel refuse to write beyond a size, in the place where it refuses on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
