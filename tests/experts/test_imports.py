"""LoHa, LoKr, Tucker LoCon and whole models, each against its dense formula."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safety_experts.commands import run
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert
from safety_experts.experts.expert_file import load_expert
from safety_experts.experts.extraction import extract_expert
from safety_experts.experts.lycoris import convert_lycoris

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def converted(layer_name, parts, rank=1000, energy=1.0):
    tensors = {f"{layer_name}.{part}": tensor for part, tensor in parts.items()}
    expert = convert_lycoris(tensors, {}, "file", rank=rank, energy=energy)
    assert list(expert.layers) == [layer_name]
    return expert.layers[layer_name], expert.info.retained_energy[layer_name]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def loha_parts():
    return {
        "hada_w1_a": random(12, 3, seed=1),
        "hada_w1_b": random(3, 10, seed=2),
        "hada_w2_a": random(12, 3, seed=3),
        "hada_w2_b": random(3, 10, seed=4),
        "alpha": torch.tensor(1.5),
    }


def test_loha():
    parts = loha_parts()
    expected = 0.5 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    layer, retained = converted(NAME, parts)
    assert relative(layer.delta(), expected) < 1e-6
    assert (layer.rank, retained) == (9, 1.0)
    u, s, vh = np.linalg.svd(expected.double().numpy())
    layer, retained = converted(NAME, parts, rank=4)
    assert relative(layer.delta(), torch.from_numpy((u[:, :4] * s[:4]) @ vh[:4])) < 1e-5
    assert retained == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_loha_convolutions_flat_and_tucker():
    flat = {
        "hada_w1_a": random(6, 2, seed=1),
        "hada_w1_b": random(2, 45, seed=2),
        "hada_w2_a": random(6, 2, seed=3),
        "hada_w2_b": random(2, 45, seed=4),
    }
    expected = ((flat["hada_w1_a"] @ flat["hada_w1_b"]) * (flat["hada_w2_a"] @ flat["hada_w2_b"])).reshape(6, 5, 3, 3)
    layer, _ = converted(CONV, flat)  # no alpha: no scaling
    assert layer.weight_shape == (6, 5, 3, 3)
    assert relative(layer.delta(), expected) < 1e-6

    tucker = {f"hada_t{n}": random(2, 2, 3, 3, seed=10 + n) for n in (1, 2)}
    tucker |= {f"hada_w{n}_a": random(2, 6, seed=20 + n) for n in (1, 2)}
    tucker |= {f"hada_w{n}_b": random(2, 5, seed=30 + n) for n in (1, 2)}
    weights = [
        torch.einsum("ijkl,jr,ip->prkl", tucker[f"hada_t{n}"], tucker[f"hada_w{n}_b"], tucker[f"hada_w{n}_a"])
        for n in (1, 2)
    ]
    layer, _ = converted(CONV, tucker)
    assert relative(layer.delta(), weights[0] * weights[1]) < 1e-6


@pytest.mark.parametrize("rank", [1000, 5])
def test_lokr(rank):
    parts = {
        "lokr_w1": random(3, 2, seed=1),
        "lokr_w2_a": random(4, 2, seed=2),
        "lokr_w2_b": random(2, 5, seed=3),
        "alpha": torch.tensor(6.0),
    }
    dense = np.kron(parts["lokr_w1"].double(), 3.0 * (parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()))
    u, s, vh = np.linalg.svd(dense)
    num = min(rank, 4)
    layer, retained = converted(NAME, parts, rank=rank)
    assert relative(layer.delta(), torch.from_numpy((u[:, :num] * s[:num]) @ vh[:num])) < 1e-5
    assert layer.rank == num
    assert retained == pytest.approx((s[:num] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_lokr_of_full_matrices_ignores_alpha_and_keeps_the_wanted_energy():
    parts = {"lokr_w1": random(3, 2), "lokr_w2": random(4, 5, 3, 3), "alpha": torch.tensor(100.0)}
    expected = torch.kron(parts["lokr_w1"][:, :, None, None], parts["lokr_w2"])
    layer, retained = converted(CONV, parts)
    assert layer.weight_shape == (12, 10, 3, 3)
    assert relative(layer.delta(), expected) < 1e-6
    s = torch.linalg.svdvals(expected.flatten(1))
    needed = 1 + int((s.square().cumsum(0) < 0.9 * s.square().sum()).sum())
    layer, retained = converted(CONV, parts, energy=0.9)
    assert layer.rank == needed < len(s)
    assert 0.9 <= retained < 1.0


def test_tucker_locon_folds_into_the_down_part():
    up, mid, down = random(6, 3, 1, 1, seed=1), random(3, 2, 3, 3, seed=2), random(2, 5, 1, 1, seed=3)
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
    expert = Expert.from_state_dict({f"{CONV}.{part}": tensor for part, tensor in tensors.items()})
    expected = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert relative(expert.layers[CONV].delta() / expert.layers[CONV].scale, expected) < 1e-6


def test_convert_command_writes_kohya_keys(tmp_path, capsys):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = loha_parts()
    save_file({f"{path}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "loha.safetensors")
    with pytest.raises(InputError, match="safety-experts convert"):
        load_expert(tmp_path / "loha.safetensors")
    out = tmp_path / "lora.safetensors"
    assert run(["convert", str(tmp_path / "loha.safetensors"), "--out", str(out), "--rank", "4"]) == 0
    assert load_expert(out).layers[NAME].rank == 4
    del parts["hada_w2_b"]
    save_file({f"{path}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "loha.safetensors")
    assert run(["convert", str(tmp_path / "loha.safetensors"), "--out", str(out), "--overwrite"]) == 2
    assert "lacks hada_w2_b; the file is incomplete" in capsys.readouterr().err


DIFFUSERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (12, 10),
    "mid_block.resnets.1.conv2.weight": (6, 5, 3, 3),
    "conv_in.weight": (6, 4, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (12,),
    "conv_in.bias": (6,),
}
NATIVE = {
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (12, 10),
    "middle_block.2.out_layers.3.weight": (6, 5, 3, 3),
    "input_blocks.0.0.weight": (6, 4, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (12,),
    "input_blocks.0.0.bias": (6,),
}


def models(tmp_path, native=False):
    """Write a base and a tuned model that differ by rank 3 in two layers, and by a norm; return paths and changes."""
    base = {key: random(*shape, seed=n) for n, (key, shape) in enumerate(DIFFUSERS.items())}
    attention, convolution, conv_in, norm, _ = base
    changes = {
        attention: random(12, 3, seed=50) @ random(3, 10, seed=51),
        convolution: (random(6, 3, seed=52) @ random(3, 45, seed=53)).reshape(6, 5, 3, 3),
        conv_in: torch.zeros(6, 4, 3, 3),
        norm: torch.ones(12),
    }
    tuned = {key: value + changes.get(key, 0.0) for key, value in base.items()}
    (tmp_path / "tuned" / "unet").mkdir(parents=True)
    save_file(tuned, tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors")
    renamed = dict(zip(NATIVE, base.values(), strict=True)) if native else base
    prefix = "model.diffusion_model." if native else ""
    save_file({prefix + key: value for key, value in renamed.items()}, tmp_path / "base.safetensors")
    return tmp_path / "tuned", tmp_path / "base.safetensors", changes[attention], changes[convolution]


@pytest.mark.parametrize("native", [False, True])
def test_extraction_finds_the_low_rank_change(tmp_path, native):
    tuned, base, attention, convolution = models(tmp_path, native)
    expert = extract_expert(tuned, base, rank=3, categories=["violence"])
    assert list(expert.layers) == [NAME, "lora_unet_mid_block_resnets_1_conv2"]
    assert relative(expert.layers[NAME].delta(), attention) < 1e-5
    assert relative(expert.layers["lora_unet_mid_block_resnets_1_conv2"].delta(), convolution) < 1e-5
    assert expert.info.retained_energy[NAME] == pytest.approx(1.0, abs=1e-5)
    assert expert.info.origin.num_left_out == (0 if native else 1)  # norms are matched only under one spelling
    smaller = extract_expert(tuned, base, rank=1)
    s = torch.linalg.svdvals(attention)
    assert smaller.info.retained_energy[NAME] == pytest.approx(float(s[0] ** 2 / s.square().sum()), abs=1e-5)


def test_extract_command_and_its_errors(tmp_path, capsys):
    tuned, base, *_ = models(tmp_path)
    out = tmp_path / "extracted.safetensors"
    assert run(["extract", str(tuned), str(base), "--out", str(out), "--rank", "3", "--category", "Violence"]) == 0
    assert load_expert(out).categories == ["violence"]
    assert "2 layers, 100.0% of a layer's change kept on average" in capsys.readouterr().out
    assert run(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "extracted: tuned minus base.safetensors" in text
    assert "truncated: 100.0% of a layer's change kept on average" in text

    with pytest.raises(InputError, match=r"has the same UNet weights as .*base\.safetensors"):
        extract_expert(base, base)
    save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"layer lora_unet_conv_in is \[8, 4, 3, 3\] in .*other\.safetensors but"):
        extract_expert(tmp_path / "other.safetensors", base)
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="have no UNet layer in common"):
        extract_expert(tmp_path / "none.safetensors", base)
    with pytest.raises(InputError, match="no such file"):
        extract_expert(tmp_path / "missing.safetensors", base)
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.safetensors in"):
        extract_expert(tmp_path, base)
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cut\.safetensors is truncated"):
        extract_expert(tmp_path / "cut.safetensors", base)


def test_extraction_from_the_toy_checkpoint_is_the_best_approximation_of_a_full_fine_tuning(tmp_path):
    """SD1.5's layer shapes, a change of full rank in linear and convolution layers, against dense SVDs."""
    path = ensure_toy_checkpoint()
    tensors = load_file(path)
    block = "model.diffusion_model.input_blocks.1"
    changes = {}
    for seed, key in enumerate((f"{block}.1.transformer_blocks.0.attn2.to_k.weight", f"{block}.0.in_layers.2.weight")):
        weight = tensors[key].float()
        u, s, vh = torch.linalg.svd(random(*weight.flatten(1).shape, seed=seed), full_matrices=False)
        decay = 0.05 * 0.9 ** torch.arange(len(s))  # as trained changes fall off
        tuned = (weight + ((u * decay) @ vh).reshape(weight.shape)).to(tensors[key].dtype)
        changes[key] = tuned.float() - weight
        tensors[key] = tuned
    save_file(tensors, tmp_path / "tuned.safetensors")

    expert = extract_expert(tmp_path / "tuned.safetensors", path, rank=16)
    prefix = "lora_unet_down_blocks_0"
    names = [f"{prefix}_attentions_0_transformer_blocks_0_attn2_to_k", f"{prefix}_resnets_0_conv1"]
    assert sorted(expert.layers) == sorted(names)
    for name, change in zip(names, changes.values(), strict=True):
        u, s, vh = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
        best = ((u[:, :16] * s[:16]) @ vh[:16]).reshape(change.shape)
        assert expert.layers[name].weight_shape == tuple(change.shape)
        assert relative(expert.layers[name].delta(), best) < 1e-3
        kept = float(s[:16].square().sum() / s.square().sum())
        assert expert.info.retained_energy[name] == pytest.approx(kept, abs=1e-5)
