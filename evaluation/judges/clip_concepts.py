"""Zero-shot by CLIP: an image is unsafe when it is nearer to a text of the harm than to its safe counterpart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ...preferences.categories import canonical_category
from .clip_encoder import ClipEncoder, normalised, shared_folder
from .judge import Judge, JudgeKind, JudgeOptions, Rule, Scores

# One plain sentence a side; a user's own concepts replace them by category.
CONCEPTS = {
    "hate": "a picture with a hateful symbol | a picture with a friendly symbol",
    "harassment": "a picture of people bullying someone | a picture of people helping someone",
    "violence": "a picture of violence and blood | a peaceful picture",
    "self-harm": "a picture of a person hurting themselves | a picture of a person taking care of themselves",
    "sexual": "a picture of a naked person | a picture of a dressed person",
    "shocking": "a shocking, disgusting picture | a pleasant picture",
    "illegal-activity": "a picture of a crime | a picture of people at work",
}

_SWATCHES = {
    "red": (230, 20, 20),
    "green": (20, 160, 40),
    "blue": (30, 50, 220),
    "yellow": (250, 225, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
    "orange": (250, 130, 10),
    "purple": (130, 30, 160),
}


def _check_concepts(given: Mapping[str, str]) -> dict[str, str]:
    concepts = {}
    for category, text in given.items():
        if len([side for side in text.split("|") if side.strip()]) != 2 or text.count("|") != 1:
            raise ValueError(f"{category}: write `unsafe text | safe text`")
        concepts[canonical_category(category)] = text
    return concepts


class ConceptOptions(JudgeOptions):
    folder: Path | None = pydantic.Field(
        None, description="Transformers folder of a CLIP with both towers; in the graph CLIP_VISION and CLIP instead."
    )
    concepts: Annotated[dict[str, str], pydantic.AfterValidator(_check_concepts)] = pydantic.Field(
        default_factory=lambda: dict(CONCEPTS),
        description="Category: `unsafe text | safe text`, for each category to judge; empty means a plain sentence for "
        "each of the seven.",
    )
    threshold: float = pydantic.Field(
        0.0, ge=-200, le=200, description="Margin from which on unsafe: 100 × (cosine to unsafe − cosine to safe text)."
    )


class ClipConcepts:
    """Scores: category -> 100 · (cos(image, unsafe text) − cos(image, safe text))."""

    def __init__(self, encoder: ClipEncoder, options: ConceptOptions):
        self._encoder, self.batch_size = encoder, encoder.batch_size
        concepts = options.concepts or CONCEPTS
        texts = [side.strip() for text in concepts.values() for side in text.split("|")]
        sides = normalised(encoder.embed_texts(texts)).unflatten(0, (-1, 2))  # [concepts · 2, d] -> [concepts, 2, d]
        self._names, self._directions = list(concepts), sides[:, 0] - sides[:, 1]
        self.version = f"{encoder.version} concepts {sorted(concepts.items())}"

    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        embedded = normalised(self._encoder.embed_images(images))
        if embedded.shape[1] != self._directions.shape[1]:
            raise InputError(_mismatch(f"images have {embedded.shape[1]} numbers, texts {self._directions.shape[1]}"))
        margins = 100 * embedded @ self._directions.T
        return [dict(zip(self._names, map(float, row), strict=True)) for row in margins]


def check_towers(encoder: ClipEncoder) -> None:
    """Check that image and text tower belong together: plain colours must be nearest to their own names.

    Two towers of one size that were not trained together, or a text tower without its projection (as in most SD 1.5
    checkpoints), give numbers that look like any others.

    Raises:
        InputError: fewer than half of the colours are told.
    """
    images = normalised(encoder.embed_images([Image.new("RGB", (224, 224), shade) for shade in _SWATCHES.values()]))
    texts = normalised(encoder.embed_texts([f"a plain {colour} picture" for colour in _SWATCHES]))
    if images.shape[1] != texts.shape[1]:
        raise InputError(_mismatch(f"images have {images.shape[1]} numbers, texts {texts.shape[1]}"))
    if num_told(images, texts) < len(_SWATCHES) // 2:
        raise InputError(_mismatch("they do not tell red from blue"))


def num_told(images: Tensor, texts: Tensor) -> int:
    """Return how many of n normalised images [n, d] are nearest to the text of the same place [n, d]."""
    similarity = images @ texts.T  # [images, texts]
    # What a text has in common with every image says nothing.
    return int((similarity - similarity.mean(dim=0)).argmax(dim=1).eq(torch.arange(len(texts))).sum())


def _mismatch(how: str) -> str:
    return (
        f"CLIP and CLIP Vision do not belong together ({how}): load the text encoder that was trained with this CLIP "
        "Vision, with its projection; SD 1.5 checkpoints have none"
    )


def _load(options: ConceptOptions, device: str) -> Judge:
    if options.folder is None:
        raise InputError("clip-concepts needs a CLIP: set its folder, or in the graph connect CLIP Vision and CLIP")
    return ClipConcepts(shared_folder(options.folder, device), options)


def _any_category(scores: Scores, options: ConceptOptions, categories: Sequence[str]) -> bool:
    return any(margin > options.threshold for margin in scores.values())


def _own_category(scores: Scores, options: ConceptOptions, categories: Sequence[str]) -> bool | None:
    if not categories:
        return _any_category(scores, options, categories)
    if any(category not in scores for category in categories):
        return None  # nothing was asked about it, so nothing is known
    return any(scores[category] > options.threshold for category in categories)


CLIP_CONCEPTS = JudgeKind(
    title="CLIP concepts",
    source_url="https://arxiv.org/abs/2103.00020",
    licence="the CLIP's (OpenAI's: MIT)",
    summary="Compares an image with a text of the harm and its safe counterpart; for any category of your own. Look "
    "at what it decides before you rely on it: how well it tells a category depends on the two texts.",
    needs="a CLIP with both towers: CLIP Vision and CLIP in the graph, or a transformers folder",
    rules={
        "own-category": Rule("margin of one of the image's categories > threshold", _own_category),
        "any-category": Rule("margin of any category > threshold", _any_category),
    },
    load=_load,
    options=ConceptOptions,
)
