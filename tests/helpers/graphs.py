"""Workflows in API format for the node tests, and reading back what they made."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.preferences.categories import CATEGORIES

SIZE_PX = 64
STRENGTHS = {name.replace("-", "_"): 1.0 for name in (*CATEGORIES, "other")}
SAMPLING = {"steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


class Graph(dict):
    """A workflow in API format; `add` returns the node's id."""

    def add(self, class_type: str, **inputs: Any) -> str:
        """Add a node; `source__text=…` stands for the input `source.text`, `(id, slot)` for a link."""
        node_id = str(len(self) + 1)
        named = {name.replace("__", "."): list(v) if isinstance(v, tuple) else v for name, v in inputs.items()}
        self[node_id] = {"class_type": class_type, "inputs": named}
        return node_id


def add_image(
    graph: Graph, checkpoint: str, prompt: str, seed: int, model=None, clip=None, save: bool = True, **sampling: Any
) -> str:
    """Add the stock nodes that draw one image; `model` and `clip` are links, by default from the checkpoint."""
    loader = checkpoint_loader(graph, checkpoint)
    clip = clip or (loader, 1)
    latent = graph.add("EmptyLatentImage", width=SIZE_PX, height=SIZE_PX, batch_size=1)
    sampled = graph.add(
        "KSampler",
        model=model or (loader, 0),
        positive=(graph.add("CLIPTextEncode", clip=clip, text=prompt), 0),
        negative=(graph.add("CLIPTextEncode", clip=clip, text=""), 0),
        latent_image=(latent, 0),
        seed=seed,
        denoise=1.0,
        **{**SAMPLING, **sampling},
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=(loader, 2))
    if not save:
        return decoded
    return graph.add("SaveImage", images=(decoded, 0), filename_prefix="test")


def checkpoint_loader(graph: Graph, checkpoint: str) -> str:
    """Return the id of the graph's checkpoint loader; add it when there is none."""
    for node_id, node in graph.items():
        if node["class_type"] == "CheckpointLoaderSimple":
            return node_id
    return graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)


def add_pairs(graph: Graph, text: str, first_seed: int = 7, category: str = "violence") -> str:
    return graph.add(
        "SafetyExpertsPromptPairs",
        source="text",
        source__text=text,
        source__category=category,
        source__first_seed=first_seed,
    )


def add_generation(graph: Graph, checkpoint: str, dataset_name: str, text: str, **inputs: Any) -> str:
    """Add Generate Pairs with all it needs."""
    loader = checkpoint_loader(graph, checkpoint)
    settings = {"negative_prompt": "", "width": SIZE_PX, "height": SIZE_PX, "batch_size": 4, "preview": "off"}
    return graph.add(
        "SafetyExpertsGeneratePairs",
        model=(loader, 0),
        clip=(loader, 1),
        vae=(loader, 2),
        prompt_pairs=(add_pairs(graph, text), 0),
        dataset_name=dataset_name,
        checkpoint=checkpoint,
        **{**settings, **SAMPLING, **inputs},
    )


def add_expert(graph: Graph, name: str) -> tuple[str, int]:
    """Return a link to an expert of the loras folders."""
    return graph.add("SafetyExpertsLoad", expert_name=f"{name}.safetensors"), 0


def add_apply(graph: Graph, checkpoint: str, expert: tuple[str, int], model=None, **inputs: Any) -> str:
    """Add Apply Safety Expert, by default to the checkpoint's model and with every strength at 1."""
    loader = checkpoint_loader(graph, checkpoint)
    common = {"model": model or (loader, 0), "clip": (loader, 1), "expert": expert}
    return graph.add("SafetyExpertsApply", **common, **{**STRENGTHS, **inputs})


def add_stock_loader(graph: Graph, checkpoint: str, name: str, strength: float = 1.0, model=None) -> str:
    """Add ComfyUI's own LoRA loader."""
    loader = checkpoint_loader(graph, checkpoint)
    return graph.add(
        "LoraLoader",
        model=model or (loader, 0),
        clip=(loader, 1),
        lora_name=f"{name}.safetensors",
        strength_model=strength,
        strength_clip=strength,
    )


def save_random_expert(
    path: Path, seed: int, rank: int, alpha: float, categories: list[str], shapes: dict[str, tuple[int, int]]
) -> None:
    """Write an expert that changes images a lot; `shapes` is layer name -> (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: LoraLayer(
            torch.randn(rank, width, generator=generator) / width**0.5,
            0.2 * torch.randn(out, rank, generator=generator),
            alpha,
        )
        for key, (out, width) in shapes.items()
    }
    base = CheckpointId(name="base.safetensors", family="sd15")
    info = ExpertInfo(categories=categories, base_checkpoint=base)
    save_expert(Expert(layers, info, path.stem), path)


def draw(server, graph: Graph, node_id: str) -> np.ndarray:
    """Run a workflow; return the pixels of the first image that node `node_id` saved, [h, w, 3] int."""
    entry = server.run(graph)
    picture = Image.open(io.BytesIO(server.view(entry["outputs"][node_id]["images"][0])))
    return np.asarray(picture).astype(int)


def cached_nodes(entry: dict) -> set[str]:
    """Return the ids of the nodes that a workflow did not have to run."""
    return {
        node for event, data in entry["status"]["messages"] if event == "execution_cached" for node in data["nodes"]
    }


def dataset_lines(server, name: str) -> list[dict]:
    path = Path(server.base_directory) / "datasets" / name / "metadata.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def dataset_pixels(server, name: str, line: dict, which: str) -> np.ndarray:
    path = Path(server.base_directory) / "datasets" / name / line[f"{which}_file_name"]
    return np.asarray(Image.open(path)).astype(int)
