"""Latents and text embeddings of a dataset, encoded once by the checkpoint's own VAE and text encoders, kept on disk.

Entries are keyed by content (image bytes, prompt text), so editing one pair encodes that pair again and nothing else.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import sha256_of_file
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Conditions
from ..preferences.dataset import PreferenceDataset, PreferencePair
from ..preferences.images import read_image
from .buckets import fit_bucket
from .tensor_store import TensorStore

IMAGES_PER_PASS = 8
PROMPTS_PER_PASS = 32
PASSES_PER_SHARD = 16
OnProgress = Callable[[int, int], None]  # (done, total)


def read_pixels(path: Path, resolution_px: int | None = None) -> Tensor:
    """Read an image as [3, h, w] float32 in [0, 1], cropped at the centre to multiples of 8 pixels.

    Args:
        resolution_px: larger images are first brought into their bucket (buckets.py); None takes them as they are.

    Raises:
        InputError: the file is missing, truncated or smaller than 8 pixels.
    """
    image = read_image(path)
    if resolution_px:
        image = fit_bucket(image, resolution_px)
    width_px, height_px = image.width // 8 * 8, image.height // 8 * 8
    if not width_px or not height_px:
        raise InputError(f"image {path} is {image.width}x{image.height} px; at least 8x8 is needed")
    left, top = (image.width - width_px) // 2, (image.height - height_px) // 2
    pixels = np.asarray(image.crop((left, top, left + width_px, top + height_px)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]


class PairCache:
    """What a trainer reads of a dataset: latents of both images of a pair, conditions of a prompt.

    Args:
        dataset: the images live here; the cache in its `.cache` folder.
        checkpoint: its VAE and text encoders do the encoding, one after the other, and are freed afterwards.
        device, dtype: where and in what precision to encode.
        resolution_px: images of a larger area are brought into aspect-ratio buckets of this one; None: as they are.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        resolution_px: int | None = None,
    ):
        self.dataset, self.checkpoint = dataset, checkpoint
        self.device, self.dtype, self.resolution_px = device, dtype, resolution_px
        precision = str(dtype).removeprefix("torch.")
        self.folder = Path(dataset.folder) / ".cache" / f"{checkpoint.encoding_id}-{precision}"
        self._latents = TensorStore(self.folder, "latents")
        self._text = TensorStore(self.folder, "text")
        self._image_keys: dict[Path, str] = {}

    def _image_key(self, path: Path, flipped: bool) -> str:
        if path not in self._image_keys:
            self._image_keys[path] = sha256_of_file(path, follow_links=False)[:32]
        size = f"-{self.resolution_px}px" if self.resolution_px else ""
        return self._image_keys[path] + size + ("-flipped" if flipped else "")

    def encode_pairs(self, pairs: Sequence[PreferencePair], *, flips: bool, on_progress: OnProgress) -> None:
        """Encode the images of `pairs` that are not yet in the cache (mirrored too where `flips`).

        Raises:
            InputError: an image is missing or broken, or the two images of a pair differ in size.
        """
        missing: dict[str, tuple[Path, bool]] = {}
        for pair in pairs:
            for path in self.dataset.image_paths(pair):
                for flipped in (False, True) if flips else (False,):
                    key = self._image_key(path, flipped)
                    if key not in self._latents:
                        missing[key] = (path, flipped)
        if not missing:
            return
        vae = self.checkpoint.load_vae(dtype=self.dtype, device=self.device)
        done, finished = 0, {}
        for group in _chunks(list(missing.items()), IMAGES_PER_PASS):
            by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
            for key, (path, flipped) in group:
                pixels = read_pixels(path, self.resolution_px)
                by_shape.setdefault(pixels.shape, []).append((key, pixels.flip(-1) if flipped else pixels))
            for items in by_shape.values():
                latents = vae.encode_images(torch.stack([pixels for _, pixels in items])).float().cpu()
                finished.update({key: latent.clone() for (key, _), latent in zip(items, latents, strict=True)})
            done += len(group)
            if len(finished) >= IMAGES_PER_PASS * PASSES_PER_SHARD or done == len(missing):
                self._latents.add_shard(finished)
                finished = {}
            on_progress(done, len(missing))

    def encode_prompts(self, prompts: Iterable[str], *, on_progress: OnProgress) -> None:
        """Encode the prompts that are not yet in the cache."""
        missing = sorted({prompt for prompt in prompts if not self._text.names(_prompt_key(prompt))})
        if not missing:
            return
        encoder = self.checkpoint.load_text_encoder(dtype=self.dtype, device=self.device)
        done, finished = 0, {}
        for group in _chunks(missing, PROMPTS_PER_PASS):
            conditions = encoder.encode_prompts(list(group))
            for index, prompt in enumerate(group):
                for name, values in conditions.items():
                    if (value := values[index]) is not None:
                        finished[f"{_prompt_key(prompt)}.{name}"] = value.cpu().clone()
            done += len(group)
            if done % (PROMPTS_PER_PASS * PASSES_PER_SHARD) == 0 or done == len(missing):
                self._text.add_shard(finished)
                finished = {}
            on_progress(done, len(missing))

    def latents(self, pair: PreferencePair, *, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Return (chosen, rejected) latents as the UNet sees them, each [c, h, w] float32."""
        chosen, rejected = (self._latents[self._image_key(path, flipped)] for path in self.dataset.image_paths(pair))
        if chosen.shape != rejected.shape:
            raise InputError(
                f"pair {pair.id}: chosen and rejected image differ in size (latents {tuple(chosen.shape)} and "
                f"{tuple(rejected.shape)}); draw both at one size or drop the pair"
            )
        return chosen, rejected

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Return the conditions of `prompts`, rows in their order: say hidden_states [b, t, d], and pooled for SDXL."""
        rows = {prompt: self._row(prompt) for prompt in set(prompts)}
        names = sorted({name for row in rows.values() for name in row})
        return {name: _stacked([rows[prompt].get(name) for prompt in prompts]) for name in names}

    def _row(self, prompt: str) -> dict[str, Tensor]:
        key = _prompt_key(prompt)
        return {name: self._text[f"{key}.{name}"] for name in self._text.names(key)}


def _stacked(rows: list[Tensor | None]) -> Tensor | list[Tensor | None]:
    present = [row for row in rows if row is not None]
    return torch.stack(present) if len({row.shape for row in present}) == 1 and len(present) == len(rows) else rows


def _prompt_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def _chunks(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
