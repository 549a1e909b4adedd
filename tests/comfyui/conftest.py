from collections.abc import Iterator

import pytest
import small_clips
import torch
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.experts.keys import kohya_name
from safety_experts.models.checkpoint import load_checkpoint


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


@pytest.fixture(scope="session")
def attention_shapes(server, checkpoint) -> dict[str, tuple[int, int]]:
    """Kohya name -> (out, in) of every attention layer of the test model."""
    path = server.base_directory / "models" / "checkpoints" / checkpoint
    unet = load_checkpoint(path).load_model(dtype=torch.float32, device="cpu")
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        kohya_name(path): tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if path.endswith(ends) and hasattr(module, "weight")
    }


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory):
    """A small image classifier of transformers."""
    return small_clips.write_classifier(tmp_path_factory.mktemp("judges") / "classifier")
