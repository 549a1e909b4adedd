"""Pictures and texts as CLIP embeddings: the seam that a transformers folder and ComfyUI's CLIP models both fill."""

import json
import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ...transformers_folder import check_loaded, config_of, weights_sha256

# OpenAI's, of every CLIP that does not say otherwise.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(Protocol):
    """A CLIP with its projections. Embeddings are float32 on the CPU, [n, d], not normalised.

    Attributes:
        version: which weights.
        batch_size: pictures at once.
    """

    version: str
    batch_size: int

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Raises InputError where there is no text tower."""
        ...


class ClipFolder:
    """A CLIP, or its image tower alone, in a transformers folder; nothing is downloaded and no pickle is opened."""

    batch_size = 32

    def __init__(self, folder: Path, device: str):
        """Load it.

        Raises:
            InputError: the folder holds no CLIP, or weights of it are missing.
        """
        import transformers

        self.folder, self.device = folder, device
        config = config_of(folder)
        classes: dict[str, Any] = {
            "clip": transformers.CLIPModel,
            "clip_vision_model": transformers.CLIPVisionModelWithProjection,
        }
        if config.model_type not in classes:
            raise InputError(f"{folder}: holds a {config.model_type} model, not a CLIP; give a folder with a CLIP")
        self._has_text = config.model_type == "clip"
        vision = config.vision_config if self._has_text else config
        self._model = check_loaded(classes[config.model_type], folder).to(device)
        self._size_px, self._mean, self._std = vision.image_size, *_normalisation(folder)
        self.version = f"clip {weights_sha256(folder)[:16]}"
        self._tokenizer: Any = None

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image, self._size_px, self._mean, self._std) for image in images])
        pixels = pixels.to(self.device)
        if self._has_text:
            return _vector(self._model.get_image_features(pixel_values=pixels)).float().cpu()
        return self._model(pixel_values=pixels).image_embeds.float().cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if not self._has_text:
            raise InputError(f"{self.folder}: holds the image tower of a CLIP only; concepts need its text tower too")
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except (OSError, ValueError) as error:
                raise InputError(f"{self.folder}: no tokenizer in the folder; add vocab.json and merges.txt") from error
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _vector(self._model.get_text_features(**tokens)).float().cpu()


class SharedClip:
    """A CLIP that several judges look through: what is the same batch for all of them is embedded once."""

    def __init__(self, encoder: ClipEncoder):
        self._encoder, self.version, self.batch_size = encoder, encoder.version, encoder.batch_size
        self._latest: tuple[list[Image.Image], Tensor] = ([], torch.empty(0))

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        known, embedded = self._latest
        if len(known) != len(images) or any(a is not b for a, b in zip(known, images, strict=True)):
            embedded = self._encoder.embed_images(images)
            self._latest = list(images), embedded
        return embedded.clone()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.embed_texts(texts)


_OPEN: weakref.WeakValueDictionary[Hashable, SharedClip] = weakref.WeakValueDictionary()


def shared_clip(key: Hashable, load: Callable[[], ClipEncoder]) -> SharedClip:
    """Return the CLIP that is open under this key as long as somebody uses it, or load it."""
    shared = _OPEN.get(key)
    if shared is None:
        shared = _OPEN[key] = SharedClip(load())
    return shared


def shared_folder(folder: Path, device: str) -> SharedClip:
    """Return the CLIP in a transformers folder, one for all judges that use it.

    Raises:
        InputError: as `ClipFolder`.
    """
    return shared_clip((folder.resolve(), device), lambda: ClipFolder(folder, device))


def _vector(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output  # an object since transformers 5


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return _MEAN, _STD
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, settings.get(key, fallback))) for key, fallback in _KEYS)
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not a preprocessor's settings; put the right file there or remove it") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"{path}: image_mean and image_std need three numbers each, those of image_std above 0")
    return mean, std


_KEYS = (("image_mean", _MEAN), ("image_std", _STD))


def preprocess(image: Image.Image, size_px: int, mean: Sequence[float] = _MEAN, std: Sequence[float] = _STD) -> Tensor:
    """Return an image as a CLIP sees it, [3, size_px, size_px]: shorter side resized (bicubic), centre cut out."""
    image = image.convert("RGB")
    scale = size_px / min(image.size)
    width, height = (max(size_px, int(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    image = image.crop((left, top, left + size_px, top + size_px))
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 255  # [h, w, 3] -> [3, h, w]
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def normalised(vectors: Tensor) -> Tensor:
    """Return vectors [n, d] at length 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
