import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safety_experts import tensor_file
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import expert_metadata, load_expert, save_expert
from safety_experts.experts.info import FORMAT_VERSION, ExpertInfo, Trained
from safety_experts.files import sha256_of_file

INFO = ExpertInfo(
    categories=("violence",),
    base_checkpoint=CheckpointId(name="toy", sha256="ab" * 32, family="sd15"),
    origin=Trained(recipe={"learning_rate": 0.001}, seed=7, step=60),
)


def test_save_load_save_gives_the_same_bytes(make_expert, tmp_path):
    expert = make_expert(rank=4, alpha=2.5)
    expert = replace(expert, info=INFO, name="first")
    save_expert(expert, tmp_path / "first.safetensors")
    loaded = load_expert(tmp_path / "first.safetensors")
    save_expert(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert loaded.file_sha256 == sha256_of_file(tmp_path / "first.safetensors")
    assert loaded.tensors_sha256() == expert.tensors_sha256()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_bit_comes_back(make_expert, tmp_path, dtype):
    expert = make_expert(dtype=dtype)
    save_expert(expert, tmp_path / "e.safetensors")
    loaded = load_expert(tmp_path / "e.safetensors")
    for name, layer in expert.layers.items():
        assert torch.equal(loaded.layers[name].down, layer.down)
        assert torch.equal(loaded.layers[name].up, layer.up)
        assert loaded.layers[name].down.dtype == dtype
    assert loaded.categories == ["violence"]


def test_the_safetensors_library_reads_the_same_tensors(make_expert, tmp_path):
    expert = make_expert()
    save_expert(expert, tmp_path / "e.safetensors")
    tensors = load_file(tmp_path / "e.safetensors")
    assert tensors.keys() == expert.state_dict().keys()
    assert all(torch.equal(tensors[key], value) for key, value in expert.state_dict().items())


def test_metadata_names_network_base_model_and_origin(make_expert, tmp_path):
    expert = replace(make_expert(rank=4, alpha=2.0), info=INFO)
    save_expert(expert, tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_seed"] == "7"
    written = json.loads(metadata["safety_experts"])
    assert written.pop("format_version") == FORMAT_VERSION and ExpertInfo.model_validate(written) == INFO


@pytest.mark.parametrize(("family", "architecture"), [("sd3", "stable-diffusion-3/lora"), ("flux", "flux-1/lora")])
def test_transformers_carry_their_architecture(make_expert, family, architecture):
    info = ExpertInfo(base_checkpoint=CheckpointId(name="toy", family=family))
    assert expert_metadata(replace(make_expert(), info=info))["modelspec.architecture"] == architecture


def test_other_peoples_loras_load_without_categories(make_expert, tmp_path):
    save_file(make_expert().state_dict(), tmp_path / "foreign.safetensors", metadata={"ss_network_dim": "4"})
    expert = load_expert(tmp_path / "foreign.safetensors")
    assert expert.categories == []
    assert expert.name == "foreign"
    assert len(expert.layers) == 3


def test_errors_name_the_file_and_the_remedy(make_expert, tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*missing\.safetensors; check"):
        load_expert(tmp_path / "missing.safetensors")
    good = tmp_path / "good.safetensors"
    save_expert(make_expert(), good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:5])
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for name in ("cut", "short", "pickle"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors is truncated or not a safetensors file") as caught:
            load_expert(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"format_version": 99}', "format 99, this version reads 1 and 2")],
)
def test_metadata_that_is_not_ours_to_read(make_expert, tmp_path, text, message):
    save_file(make_expert().state_dict(), tmp_path / "e.safetensors", metadata={"safety_experts": text})
    with pytest.raises(InputError, match=message):
        load_expert(tmp_path / "e.safetensors")


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    layer = LoraLayer(torch.tensor([[float("nan")]]), torch.ones(1, 1), 1.0)
    with pytest.raises(SafetyExpertsError, match=r"layer lora_unet_x holds NaN"):
        save_expert(Expert({"lora_unet_x": layer}), tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_differently_is_not_kept(make_expert, tmp_path, monkeypatch):
    real = tensor_file.tensor_bytes
    written = []

    def spoil_the_first(tensor):
        written.append(tensor)
        return bytes(len(real(tensor))) if len(written) == 1 else real(tensor)

    monkeypatch.setattr(tensor_file, "tensor_bytes", spoil_the_first)
    with pytest.raises(SafetyExpertsError, match="read back differs"):
        save_expert(make_expert(), tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_repr_is_short_and_shows_no_numbers(make_expert):
    expert = make_expert()
    assert repr(expert) == "Expert('expert_0', 3 layers, categories ['violence'])"
    assert "tensor" not in repr(next(iter(expert.layers.values())))


def test_sdxl_vector_embedding_is_written_the_way_every_loader_reads_it(tmp_path):
    layer = LoraLayer(torch.ones(2, 6), torch.ones(4, 2), 2.0)
    expert = Expert({"lora_unet_add_embedding_linear_1": layer}, ExpertInfo(), "sdxl")
    save_expert(expert, tmp_path / "sdxl.safetensors")
    assert "lora_unet_label_emb_0_0.alpha" in load_file(tmp_path / "sdxl.safetensors")
    assert load_expert(tmp_path / "sdxl.safetensors").tensors_sha256() == expert.tensors_sha256()
