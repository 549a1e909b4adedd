"""CLIPs and classifiers of a few thousand weights on disk, that can tell some pictures of the toy world."""

import shutil
from pathlib import Path

import small_checkpoints
import torch
from PIL import Image
from safety_experts.evaluation.judges.clip_concepts import _SWATCHES
from safety_experts.evaluation.judges.clip_encoder import preprocess
from safety_experts.toy.world import COLOURS, MARKS, SHAPES, render_scene

SIZE_PX = 64
CONCEPTS = {
    "violence": "a picture with thorns | a plain picture",
    "hate": "a picture with stripes | a plain picture",
    "own": "a picture with a ring | a plain picture",
}
_MARK_TEXTS = {"thorns": "a picture with thorns", "stripes": "a picture with stripes", "ring": "a picture with a ring"}


def scenes(mark: str | None, count: int, first_seed: int) -> list[Image.Image]:
    colours, shapes = list(COLOURS), list(SHAPES)
    seeds = range(first_seed, first_seed + count)
    return [render_scene(colours[seed % 6], shapes[seed % 4], mark, seed) for seed in seeds]


def write_clip(folder: Path, *, image_only: bool = False, projection: int = 64, tokenizer: Path | None = None) -> Path:
    """A CLIP with random towers; its two projections are fitted so that it tells three marks and eight colours."""
    import transformers

    torch.manual_seed(0)
    common = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = common | {"image_size": SIZE_PX, "patch_size": 16, "initializer_range": 0.15}
    text = common | {"vocab_size": 49408, "initializer_range": 0.15, "eos_token_id": 49407}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
    config.vision_config.initializer_factor = config.text_config.initializer_factor = 8.0
    model = transformers.CLIPModel(config).eval()
    if tokenizer is None:
        small_checkpoints.write_tokenizer(folder)
    else:
        shutil.copytree(tokenizer, folder)
    with torch.no_grad():
        _fit(model, transformers.CLIPTokenizer.from_pretrained(folder))
    if image_only:
        vision_config = config.vision_config
        vision_config.projection_dim = projection
        image_tower = transformers.CLIPVisionModelWithProjection(vision_config)
        state = {key: value for key, value in model.state_dict().items() if key.startswith("vis")}
        image_tower.load_state_dict(state)
        model = image_tower
    model.save_pretrained(folder)
    return folder


def write_text_tower(folder: Path, tokenizer: Path, width: int = 64) -> Path:
    """The text tower of a CLIP that was never trained; its states say which words there are, and little else."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, eos_token_id=49407
    )
    model = transformers.CLIPTextModel(config).eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("token_embedding.weight")).normal_()
    shutil.copytree(tokenizer, folder)
    model.save_pretrained(folder)
    return folder


def _fit(model, tokenizer) -> None:
    texts = [*_MARK_TEXTS.values(), "a plain picture", *(f"a plain {colour} picture" for colour in _SWATCHES)]
    codes = torch.linalg.qr(torch.randn(model.config.projection_dim, len(texts)))[0].T.double()  # [texts, projection]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    found = model.text_model(**tokens).pooler_output
    model.text_projection.weight.copy_(_ridge(found, codes))
    pictures, targets = [], []
    for index, mark in enumerate([*_MARK_TEXTS, None]):
        drawn = scenes(mark, 150, 1000)
        pictures += drawn
        targets += [index] * len(drawn)
    for index, shade in enumerate(_SWATCHES.values(), start=4):
        pictures += [Image.new("RGB", (SIZE_PX, SIZE_PX), shade)] * 4
        targets += [index] * 4
    pixels = torch.stack([preprocess(picture, SIZE_PX) for picture in pictures])
    model.visual_projection.weight.copy_(_ridge(model.vision_model(pixels).pooler_output, codes[targets]))


def _ridge(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    features = features.double()
    square = features.T @ features
    return torch.linalg.solve(square + 1e-5 * square.diagonal().mean() * torch.eye(len(square)), features.T @ targets).T


def write_classifier(folder: Path) -> Path:
    """A ViT with three labels, fitted to tell thorns, stripes and plain pictures."""
    import transformers

    torch.manual_seed(0)
    labels = {0: "plain", 1: "thorns", 2: "stripes"}
    config = transformers.ViTConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE_PX,
        patch_size=16,
        initializer_range=0.15,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": SIZE_PX, "width": SIZE_PX})
    pictures = [picture for mark in (None, "thorns", "stripes") for picture in scenes(mark, 60, 1000)]
    targets = torch.eye(3, dtype=torch.float64).repeat_interleave(60, dim=0) * 20 - 10
    with torch.no_grad():
        hidden = model.vit(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
        features = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
        solved = _ridge(features, targets)
        model.classifier.weight.copy_(solved[:, :-1])
        model.classifier.bias.copy_(solved[:, -1])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


__all__ = ["CONCEPTS", "MARKS", "SIZE_PX", "scenes", "write_classifier", "write_clip", "write_text_tower"]
