import json

import pytest
import torch
from safetensors.torch import save_file
from safety_experts.commands import run
from safety_experts.experts.co_merge import save_activation_counts
from safety_experts.experts.expert_file import load_expert, save_expert

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def files(make_expert, tmp_path):
    paths = []
    for seed, category in ((1, "violence"), (2, "hate")):
        expert = make_expert(seed, categories=[category], layers=(LINEAR,))
        paths.append(str(tmp_path / f"{category}.safetensors"))
        save_expert(expert, paths[-1])
    return paths


def test_merge_writes_the_weighted_sum(files, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    assert run(["merge", *files, "--method", "linear", "--weights", "1,0.5", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["categories"] == ["violence", "hate"]
    parents = [load_expert(path).layers[LINEAR].delta() for path in files]
    assert torch.allclose(load_expert(out).layers[LINEAR].delta(), parents[0] + 0.5 * parents[1], atol=1e-5)


def test_merge_reads_a_statistics_file(files, tmp_path):
    statistics = tmp_path / "counts.safetensors"
    experts = [load_expert(path) for path in files]
    save_activation_counts(statistics, {LINEAR: torch.tensor([[1] * 12, [2] * 12])}, experts, {})
    out = tmp_path / "co.safetensors"
    assert run(["merge", *files, "--method", "co-merge", "--statistics", str(statistics), "--out", str(out)]) == 0
    assert torch.equal(load_expert(out).layers[LINEAR].delta(), experts[1].layers[LINEAR].delta())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "nope", "--out", "o.safetensors"], "no merge method 'nope'"),
        (["--out", "o.ckpt"], "must end in .safetensors"),
        (["--out", "o.safetensors", "--weights", "1;2"], "--weights '1;2' must be numbers"),
        (["--out", "o.safetensors", "--set", "rank"], "'rank' is not of the form key=value"),
        (["--out", "o.safetensors", "--calibration", "d"], "--calibration needs --model"),
        (["--method", "co-merge", "--out", "o.safetensors"], "co-merge needs activation statistics"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(files, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    assert run(["merge", *files, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1 and error.strip().splitlines()[-1].startswith("error: ")


def test_an_existing_file_is_not_replaced_unless_asked(files, capsys):
    assert run(["merge", files[0], "--out", files[1]]) == 2
    assert "exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert run(["merge", files[0], "--out", files[1], "--overwrite"]) == 0


def test_inspect_prints_a_merge(files, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    assert run(["merge", *files, "--out", str(out), "--weights", "1,0.5"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "both: 1 layers, rank 8, alpha 8",
        "categories: violence, hate",
        "0.5 x hate [hate]",
        "strength: violence (1 layers)",
        "knows the spelling of 3 of 3 keys",
    ):
        assert expected in text


def test_inspect_tells_which_keys_comfyui_ignores(tmp_path, capsys):
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "diffusers.safetensors"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(3, 2)}, path)
    assert run(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "knows the spelling of 0 of 2 keys" in text
    assert "safety-experts merge" in text
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comfyui"]["ignored_keys"] == 2


def test_inspect_of_a_broken_file_exits_with_2(tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    assert run(["inspect", str(tmp_path / "bad.safetensors")]) == 2
    assert "bad.safetensors is truncated or not a safetensors file" in capsys.readouterr().err
