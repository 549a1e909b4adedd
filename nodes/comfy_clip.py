"""ComfyUI's CLIP Vision and CLIP as the encoder that judges use; ComfyUI decides where and when they are loaded."""

import hashlib
from collections.abc import Sequence

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..evaluation.judges.q16_vectors import probe_image
from . import sampling


class ComfyClip:
    """A CLIP_VISION, and a CLIP for texts where concepts are judged."""

    batch_size = 32

    def __init__(self, clip_vision, clip=None):
        self._vision, self._clip = clip_vision, clip
        self._dimension = self.embed_images([probe_image()]).shape[1]
        # ComfyUI no longer knows the files, so the towers are called by their last weights.
        hashes = [_hash_of(clip_vision.model.visual_projection.weight)]
        if clip is not None:
            hashes.append(_hash_of(_tower_of(clip, self._dimension)[1].transformer.text_projection.weight))
        self.version = " ".join(["clip", *hashes])

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        found = []
        for image in images:  # of several sizes, which a batch cannot have; pictures are made square first
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(_to_square(image, self._vision.image_size))
        embedded = self._vision.encode_image(torch.cat(found))["image_embeds"]
        has_projection = isinstance(getattr(self._vision.model, "visual_projection", None), torch.nn.Module)
        if not has_projection or embedded is None or embedded.ndim != 2 or not embedded.isfinite().all():
            raise InputError(
                "this CLIP Vision gives no image embedding: load a CLIP with its projection, such as ViT-L/14"
            )
        return embedded.float().cpu()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if self._clip is None:
            raise InputError("concepts need a CLIP text encoder: connect CLIP")
        name, tower = _tower_of(self._clip, self._dimension)
        self._clip.load_model()
        found = []
        try:
            tower.set_clip_options({"projected_pooled": True, "execution_device": self._clip.patcher.load_device})
            for text in texts:
                _, pooled = tower.encode_token_weights(self._clip.tokenize(text)[name])[:2]
                found.append(pooled.float().cpu())
        finally:
            tower.reset_clip_options()
        return torch.cat(found)


def _hash_of(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().cpu().half().numpy().tobytes()).hexdigest()[:16]


def _tower_of(clip, dimension: int):
    """Return (the name of its tokens, the text tower) with as many numbers as the images have."""
    widths = []
    for name in clip.tokenize(""):
        tower = getattr(clip.cond_stage_model, f"clip_{name}", None)
        projection = getattr(getattr(tower, "transformer", None), "text_projection", None)
        if projection is not None:
            widths.append(projection.weight.shape[0])
            if projection.weight.shape[0] == dimension:
                return name, tower
    there = ", ".join(map(str, widths)) or "no CLIP text tower"
    raise InputError(
        f"CLIP and CLIP Vision do not belong together: images have {dimension} numbers, texts {there}; load the text "
        "encoder that was trained with this CLIP Vision"
    )


def _to_square(image: Image.Image, size_px: int) -> Tensor:
    """Return what CLIP's own preprocessing would cut out of an image: the middle square [1, size, size, 3]."""
    scale = size_px / min(image.size)
    width, height = (max(size_px, int(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return sampling.to_pixels(image.crop((left, top, left + size_px, top + size_px)))
