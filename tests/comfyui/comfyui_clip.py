"""Run inside a real ComfyUI: what its CLIP Vision and CLIP make of pictures and texts, through the judges' encoder.

    python comfyui_clip.py COMFYUI_FOLDER PACK_FOLDER FOLDER

FOLDER holds clip/ (a small CLIP of transformers), pictures/*.png and texts.json; embedded.safetensors is written, and
what is said of towers that do not belong together in its metadata. evaluation/ is made of rendered scenes, as Evaluate
Safety makes one with a CLIP Vision.
"""

import importlib.util
import json
import sys
from pathlib import Path

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.clip_vision  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def load_pack(folder: Path):
    spec = importlib.util.spec_from_file_location(
        "safety_experts", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["safety_experts"] = module
    spec.loader.exec_module(module)
    sys.path.append(str(folder / "tests" / "helpers"))
    return tuple(
        importlib.import_module(f"safety_experts.{name}")
        for name in ("nodes.comfy_clip", "evaluation.judges.clip_concepts", "nodes.compared")
    )


class Target:
    def __init__(self, config: Path):
        self.params = {"clip_model": comfy.sd1_clip.SDClipModel, "textmodel_json_config": str(config)}
        self.clip, self.tokenizer = comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer


def main(pack: Path, folder: Path) -> None:
    comfy_clip, clip_concepts, compared = load_pack(pack)
    weights = load_file(folder / "clip" / "model.safetensors")
    config = json.loads((folder / "clip" / "config.json").read_text())
    vision = comfy.clip_vision.ClipVisionModel(config["vision_config"] | {"projection_dim": config["projection_dim"]})
    vision.load_sd({key: value for key, value in weights.items() if key.startswith("vis")})
    text_config = folder / "text_config.json"
    text_config.write_text(json.dumps(config["text_config"]))
    text_weights = {key: value for key, value in weights.items() if key.startswith("text")}
    clip = comfy.sd.CLIP(Target(text_config), state_dict=[text_weights])
    without_projection = {key: value for key, value in text_weights.items() if "projection" not in key}
    alone = comfy.sd.CLIP(Target(text_config), state_dict=[without_projection])

    pictures = [Image.open(path) for path in sorted((folder / "pictures").glob("*.png"))]
    with torch.inference_mode():
        encoder = comfy_clip.ComfyClip(vision, clip)
        clip_concepts.check_towers(encoder)
        embedded = {
            "images": encoder.embed_images(pictures),
            "texts": encoder.embed_texts(json.loads((folder / "texts.json").read_text())),
        }
        try:
            clip_concepts.check_towers(comfy_clip.ComfyClip(vision, alone))
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    versions = json.dumps([encoder.version, comfy_clip.ComfyClip(vision, clip).version])
    import rendered_arms

    arms, plan = rendered_arms.RenderedArms(), rendered_arms.toy_plan(rendered_arms.toy_suite(6))
    with torch.inference_mode():  # as a graph runs
        compared.run_here(folder / "evaluation", plan, arms, [rendered_arms.toy_oracle()], compared.Demands(), vision)
    save_file(embedded, folder / "embedded.safetensors", metadata={"said": said, "versions": versions})


main(Path(sys.argv[2]), Path(sys.argv[3]))
