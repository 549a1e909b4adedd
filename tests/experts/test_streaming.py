"""Layers that are read from the file when asked for: the same as loading it whole, in a fraction of the memory."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, open_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts
from safety_experts.tensor_file import TensorFile

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_tensor_file_gives_what_the_library_gives(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"{dtype}": random(3, 2).to(dtype) for dtype in dtypes}
    tensors |= {f"{dtype}": torch.tensor([-1, 2]).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16)}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4), "bool": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "all.safetensors", {"a": "ü"})

    file = TensorFile(tmp_path / "all.safetensors")
    expected = load_file(tmp_path / "all.safetensors")
    assert file.metadata == {"a": "ü"} and file.keys() == expected.keys() and len(file) == len(expected)
    for name, tensor in expected.items():
        found = file[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.double(), tensor.double())


DOWN, UP, ALPHA = random(4, 10), random(12, 4), torch.tensor(2.0)
TE = "text_model.encoder.layers.0.self_attn.q_proj"
ADAPTER = json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True})
FILES = {
    "kohya": {"lora_unet_x.lora_down.weight": DOWN, "lora_unet_x.lora_up.weight": UP, "lora_unet_x.alpha": ALPHA},
    "peft": {f"unet.{PATH}.lora_A.weight": DOWN, f"unet.{PATH}.lora_B.weight": UP},
    "two text encoders": {
        f"{encoder}.{TE}.lora_{letter}.weight": tensor
        for encoder in ("text_encoder", "text_encoder_2")
        for letter, tensor in (("A", DOWN), ("B", UP))
    },
    "tucker": {
        "lora_unet_c.lora_up.weight": random(6, 3, 1, 1),
        "lora_unet_c.lora_mid.weight": random(3, 2, 3, 3),
        "lora_unet_c.lora_down.weight": random(2, 5, 1, 1),
    },
}


@pytest.mark.parametrize("spelling", FILES)
def test_an_opened_expert_is_the_loaded_one(tmp_path, spelling):
    tensors = {name: tensor.clone() for name, tensor in FILES[spelling].items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": ADAPTER})
    opened, loaded = open_expert(tmp_path / "lora.safetensors"), load_expert(tmp_path / "lora.safetensors")

    assert list(opened.layers) == list(loaded.layers)
    assert opened.tensors_sha256() == loaded.tensors_sha256()
    assert (opened.name, opened.file_sha256, opened.info) == (loaded.name, loaded.file_sha256, loaded.info)


def test_an_opened_file_is_refused_for_what_a_loaded_one_is(tmp_path):
    path = tmp_path / "lora.safetensors"
    wrong = {
        "2 of 3 keys are no LoRA keys": {"a": random(1), "b": random(1), "lora_unet_x.alpha": random(1)[0]},
        "has no up part": {"lora_unet_x.lora_down.weight": random(4, 10)},
        "has rank 4 in its down part but 3": {
            "lora_unet_x.lora_down.weight": random(4, 10),
            "lora_unet_x.lora_up.weight": random(12, 3),
        },
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        for read in (load_expert, open_expert):
            with pytest.raises(InputError, match=message):
                read(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is truncated"):
        open_expert(path)


@pytest.fixture
def large_files(tmp_path):
    """Two experts of 16 layers of half a MiB."""
    paths = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            f"lora_unet_layer_{n}": LoraLayer(
                torch.randn(64, 1024, generator=generator), torch.randn(1024, 64, generator=generator), 64.0
            )
            for n in range(16)
        }
        paths.append(tmp_path / f"expert_{seed}.safetensors")
        save_expert(Expert(layers, ExpertInfo(categories=[f"own {seed}"])), paths[-1])
    return paths


def test_merging_holds_a_few_layers_of_the_inputs(large_files):
    loaded = merge_experts([load_expert(path) for path in large_files], "svd", parameters={"rank": 1})
    experts = [open_expert(path) for path in large_files]
    tracemalloc.start()
    opened = merge_experts(experts, "svd", parameters={"rank": 1})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert opened.tensors_sha256() == loaded.tensors_sha256()
    layer_bytes = 2 * 64 * 1024 * 4
    assert layer_bytes < peak_bytes < 6 * layer_bytes  # of 32 layers


def test_the_merge_command_streams_and_writes_over_its_own_input(large_files, capsys):
    first, second = map(str, large_files)
    expected = merge_experts([load_expert(path) for path in large_files], "linear").tensors_sha256()

    assert run(["merge", first, second, "--out", first, "--overwrite", "--json"]) == 0
    assert load_expert(first).tensors_sha256() == expected
    assert json.loads(capsys.readouterr().out)["layers"] == 16
