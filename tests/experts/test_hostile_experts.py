"""Files that strangers made: every tensor and number of an expert is checked at the door, and nothing in it is run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from safety_experts.commands import run
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, open_expert, save_expert
from safety_experts.experts.info import Parent
from safety_experts.experts.merging import merge_experts

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", f"{NAME}.alpha"


def tensors(**changes) -> dict[str, torch.Tensor]:
    made = {DOWN: torch.ones(2, 5), UP: torch.ones(6, 2), ALPHA: torch.tensor(2.0)}
    made.update({{"down": DOWN, "up": UP, "alpha": ALPHA}[key]: value for key, value in changes.items()})
    return {key: value for key, value in made.items() if value is not None}


BROKEN = {
    "alpha NaN": tensors(alpha=torch.tensor(math.nan)),
    "alpha infinite": tensors(alpha=torch.tensor(math.inf)),
    "alpha of two": tensors(alpha=torch.ones(2)),
    "alpha of none": tensors(alpha=torch.ones(0)),
    "rank 0": tensors(down=torch.ones(0, 5), up=torch.ones(6, 0)),
    "no rows": tensors(up=torch.ones(0, 2)),
    "0-d": tensors(down=torch.tensor(1.0)),
    "1-d": tensors(up=torch.ones(6)),
    "ranks differ": tensors(up=torch.ones(6, 3)),
    "3-d": tensors(down=torch.ones(2, 5, 1)),
    "kernel up": tensors(up=torch.ones(6, 2, 3, 3)),
    "int8": tensors(down=torch.ones(2, 5, dtype=torch.int8)),
    "float8": tensors(up=torch.ones(6, 2).to(torch.float8_e4m3fn)),
    "NaN": tensors(down=torch.full((2, 5), math.nan)),
    "infinite": tensors(up=torch.full((6, 2), math.inf)),
    "alpha alone": {ALPHA: torch.tensor(1.0)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_layer_that_is_none_is_refused_by_every_verb_in_one_line(kind, tmp_path, capsys):
    path, sound, out = (tmp_path / f"{name}.safetensors" for name in ("broken", "sound", "out"))
    save_file(BROKEN[kind], path)
    save_file(tensors(), sound)
    for verb in (
        ["inspect", str(path)],
        ["convert", str(path), "--out", str(out)],
        ["merge", str(path), str(sound), "--method", "svd", "--out", str(out)],
        ["protect", str(path), "--expert", str(sound), "--out", str(out)],
        ["protect", str(sound), "--expert", str(path), "--out", str(out)],
    ):
        assert run(verb) == 2, verb
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "broken.safetensors" in lines[0] and "unexpected" not in lines[0]
        assert not out.exists()


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {NAME: LoraLayer(torch.ones(1, 5), torch.ones(6, 1), math.nan)},
        {NAME: LoraLayer(torch.ones(0, 5), torch.ones(6, 0), 1.0)},
        {NAME: LoraLayer(torch.ones(1, 5), torch.full((6, 1), math.inf), 1.0)},
    ],
)
def test_nothing_is_saved_that_could_not_be_loaded(layers, tmp_path):
    with pytest.raises(SafetyExpertsError, match="was not written"):
        save_expert(Expert(layers), tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_overflow_are_an_error_alone_and_in_a_merge(tmp_path):
    huge, large = tmp_path / "huge.safetensors", tmp_path / "large.safetensors"
    save_file(tensors(down=torch.full((2, 5), 1e30), up=torch.full((6, 2), 1e30)), huge)
    with pytest.raises(InputError, match="does not fit into 32 bits"):
        load_expert(huge)
    save_file(tensors(down=torch.full((2, 5), 1e19), up=torch.full((6, 2), 1e19)), large)
    expert = load_expert(large)
    for method in ("linear", "ties", "svd", "karcher", "co-merge-weights"):
        with pytest.raises(SafetyExpertsError):
            merged = merge_experts([expert, expert], method, weights=[1e10, 1e10])
            save_expert(merged, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "broken",
    [
        {"hada_w1_a": (6, 2), "hada_w1_b": (3, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2)},
        {"hada_w1_a": (6,), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
        {"lokr_w1": (2, 0), "lokr_w2": (3, 1)},
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (2, 5), "lokr_w2": (3, 1)},
        {"lokr_w2": (3, 1)},
    ],
)
def test_broken_loha_and_lokr_are_one_line(broken, tmp_path, capsys):
    save_file({f"{NAME}.{part}": torch.ones(shape) for part, shape in broken.items()}, tmp_path / "b.safetensors")
    assert run(["convert", str(tmp_path / "b.safetensors"), "--out", str(tmp_path / "o.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--rank", "0"), ("--rank", "-3"), ("--energy", "nan"), ("--energy", "2")]
)
def test_a_rank_or_energy_that_asks_for_nothing_is_refused(option, value, tmp_path, capsys):
    save_file(tensors(), tmp_path / "a.safetensors")
    assert (
        run(["convert", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "o.safetensors"), option, value]) == 2
    )
    assert capsys.readouterr().err.startswith(f"error: {option[2:]} ")


def peft_file(path, metadata) -> None:
    key = "unet." + ".".join(["down_blocks.0.attentions.0.transformer_blocks"] + ["a"] * 40) + ".attn1.to_q"
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    values = {f"{key}.lora_A.weight": torch.ones(2, 5), f"{key}.lora_B.weight": torch.ones(6, 2)}
    save_file(values, path, {"lora_adapter_metadata": text})


@pytest.mark.parametrize(
    "metadata",
    [
        {"unet.alpha_pattern": {"((a+.)+)+b": 1}},
        {"unet.alpha_pattern": {"(.*a){25}": 1}},
        {"unet.alpha_pattern": {"(": 1}},
        {"unet.alpha_pattern": {"to_q": "much"}},
        {"unet.alpha_pattern": ["to_q"]},
        {"unet.lora_alpha": None, "lora_alpha": None},
        {"unet.lora_alpha": 10**400},
        '{"unet.lora_alpha": NaN}',
        "[" * 100_000,
        "[]",
        "{",
    ],
)
def test_alphas_in_the_metadata_are_numbers_and_no_pattern_is_run(metadata, tmp_path):
    peft_file(tmp_path / "p.safetensors", metadata)
    with pytest.raises(InputError, match="lora_adapter_metadata") as caught:
        load_expert(tmp_path / "p.safetensors")
    assert "\n" not in str(caught.value)


def test_the_first_name_that_is_the_end_of_a_path_counts(tmp_path):
    peft_file(
        tmp_path / "p.safetensors", {"unet.lora_alpha": 8, "unet.alpha_pattern": {"q": 7, "to_q": 3, "attn1.to_q": 4}}
    )
    assert next(iter(load_expert(tmp_path / "p.safetensors").layers.values())).alpha == 3.0
    assert next(iter(open_expert(tmp_path / "p.safetensors").layers.values())).alpha == 3.0


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b", "a\\b", "c:x"])
def test_reproduce_opens_no_file_that_the_metadata_choose(name, make_expert, tmp_path, monkeypatch):
    opened = []
    from safety_experts.experts import reproduction

    monkeypatch.setattr(reproduction, "open_expert", lambda path: opened.append(path) or open_expert(path))
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in (tmp_path / "secret.safetensors", folder / "a.safetensors"):
        save_expert(make_expert(1, layers=(NAME,)), path)
    merged = merge_experts([load_expert(folder / "a.safetensors")], "linear", weights=[0.5])
    parent = Parent(name=name, tensors_sha256="0" * 64)
    origin = merged.info.origin.model_copy(update={"parents": (parent,)})
    changed = replace(merged, info=merged.info.model_copy(update={"origin": origin}))
    save_expert(changed, folder / "merged.safetensors")
    with pytest.raises(InputError, match="is missing"):
        reproduction.reproduce_merge(folder / "merged.safetensors")
    assert opened == []
