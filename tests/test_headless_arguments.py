"""What is said of the arguments that name a model's files for a ComfyUI, before one is started."""

import pytest
from safety_experts.commands import run


@pytest.fixture
def comfyui(tmp_path):
    """A folder that looks like a ComfyUI's, with two files in its models folder."""
    for name in ("main.py", "nodes.py", "comfy/sd.py", "models/diffusion_models/unet.safetensors", "models/vae/v.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"comfyui": "nowhere"}, "nowhere is not a ComfyUI folder"),
        ({"model": "absent.safetensors"}, "no such file: absent.safetensors; give a path, or a name in"),
        ({"clip-type": ""}, "--clip-type is missing"),
        ({"vae": ""}, "--vae is missing"),
        ({"vae": "v.gguf"}, "v.gguf is a GGUF file"),
        ({"clip": ""}, "--clip-type and --weight-dtype are for separate files"),
        ({"comfyui": ""}, "goes with --comfyui DIR only"),
        ({"device": "cuda"}, "--device with --comfyui is cpu"),
        ({"tokenizer": "x"}, "--tokenizer does not go with --comfyui"),
        ({"scheduler": "simple", "karras": None}, "--karras and --scheduler say the same"),
    ],
)
def test_wrong_arguments_are_one_line(comfyui, tmp_path, capsys, given, message):
    prompts = tmp_path / "pairs.csv"
    prompts.write_text("prompt,safe_prompt,category\na red circle with thorns,a red circle,violence\n")
    unet = str(comfyui / "models" / "diffusion_models" / "unet.safetensors")
    settings = {"comfyui": str(comfyui), "model": "unet.safetensors", "clip": unet, "clip-type": "sd3", "vae": unet}
    words = ["dataset", "build", "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    for name, value in (settings | given).items():
        words += [f"--{name}"] if value is None else [f"--{name}", value] if value else []
    assert run(words) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()
