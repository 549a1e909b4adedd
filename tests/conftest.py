"""Two tiers: without ComfyUI and slow ones in `make check`, everything in `make test`."""

from pathlib import Path

import pytest

_WITH_COMFYUI = {"comfyui", "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _WITH_COMFYUI & set(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.comfyui)
