from collections.abc import Iterator

import pytest
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The real server with this pack, started once; at the end its log must be free of loading failures."""
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as started:
        yield started
    started.check_log()


@pytest.fixture(scope="session")
def checkpoint(server: ComfyServer) -> str:
    """The toy checkpoint's name in the server's list of checkpoints."""
    return server.add_model(ensure_toy_checkpoint())
