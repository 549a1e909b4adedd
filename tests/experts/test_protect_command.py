import json

import pytest
from safetensors.torch import save_file
from safety_experts.commands import run
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.overlap import overlap
from safety_experts.experts.reproduction import reproduce_merge

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DIFFUSERS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def files(make_expert, tmp_path):
    """A style as diffusers writes it (keys that stock ComfyUI ignores, float16, no alpha), and two experts."""
    style = make_expert(3, rank=2).layers[LINEAR]
    tensors = {f"{DIFFUSERS}.lora_A.weight": style.down.half(), f"{DIFFUSERS}.lora_B.weight": style.up.half()}
    save_file(tensors, tmp_path / "style.safetensors")
    for seed, category in ((1, "violence"), (2, "hate")):
        save_expert(make_expert(seed, categories=[category]), tmp_path / f"{category}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("style", "violence", "hate")]


def test_protect_writes_a_style_without_overlap_that_can_be_reproduced(files, tmp_path, capsys):
    out = tmp_path / "safe_style.safetensors"
    style, violence, hate = files
    assert run(["protect", style, "--expert", violence, "--expert", hate, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    protected, before = load_expert(out), load_expert(style)
    assert protected.name == "safe_style" and list(protected.layers) == [LINEAR]
    for path, entry in zip((violence, hate), report["overlaps"], strict=True):
        expert = load_expert(path)
        assert entry["expert"] == expert.name
        assert entry["layers"][LINEAR] == entry["all"] == overlap(expert, before)[LINEAR].to_json()
        assert entry["all"]["read_share"] > 0.1
        assert overlap(expert, protected)[LINEAR].written_share < 1e-12
    sizes = [lora.layers[LINEAR].delta().norm() ** 2 for lora in (before, protected)]
    assert report["kept_energy"] == pytest.approx(float(sizes[1] / sizes[0]), abs=1e-5)
    assert [parent.sha256 for parent in protected.info.parents] == [load_expert(path).file_sha256 for path in files]
    assert reproduce_merge(out).is_identical
    assert run(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "protected: style [] " in text and "\n  violence [violence] " in text


def test_protecting_a_protected_merge_still_reproduces(files, tmp_path):
    """What the style's metadata says of its own making must not be taken for how it was protected."""
    _, violence, hate = files
    merged, out = str(tmp_path / "merged.safetensors"), str(tmp_path / "out.safetensors")
    assert run(["merge", files[0], violence, "--method", "svd", "--set", "rank=3", "--out", merged]) == 0
    assert run(["protect", merged, "--expert", hate, "--space", "both", "--strength", "0.5", "--out", out]) == 0
    assert reproduce_merge(out).is_identical


def test_without_out_only_the_report_is_printed(files, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert run(["protect", files[0], "--expert", files[1], "--report"]) == 0
    text = capsys.readouterr().out
    assert "style on violence: 1 of the style's 1 layers are in the expert" in text
    assert LINEAR in text and "all together" in text and "write it with --out" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--strength", "2"], "strength 2 must be from 0 to 1"),
        (["--out", "style.ckpt"], "must end in .safetensors"),
        (["--expert", "absent.safetensors"], "no such file: absent.safetensors"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(files, capsys, monkeypatch, tmp_path, extra, message):
    monkeypatch.chdir(tmp_path)
    assert run(["protect", files[0], "--expert", files[1], *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1
