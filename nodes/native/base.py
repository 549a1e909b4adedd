"""MODEL, CLIP and VAE as the base model of a training: what a checkpoint is on the other path."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...checkpoint_id import CheckpointId
from ...errors import InputError
from ...experts.expert import Expert
from ...preferences.dataset import PreferenceDataset
from ...training.recipe import Recipe
from . import identity, kernels, refusals
from .conditions import encode_rows
from .policy import NativePolicy


class NativeBase:
    """Encodes with CLIP and VAE and trains on MODEL, of any family that ComfyUI can load.

    Attributes:
        id: of the MODEL, its patches included.

    Raises:
        InputError: a part is missing, or the MODEL cannot be trained on.
    """

    def __init__(self, model, clip, vae):
        missing = [name for name, part in (("clip", clip), ("vae", vae)) if part is None]
        if missing:
            are = "are" if len(missing) > 1 else "is"
            raise InputError(
                f"{' and '.join(missing)} {are} not connected: training on a MODEL needs its CLIP and VAE too "
                "(CLIPLoader and VAELoader, or those of the checkpoint)"
            )
        refusals.check_model(model)
        refusals.check_vae(model.model, vae)
        self._model, self._clip, self._vae = model, clip, vae
        self._policy: NativePolicy | None = None
        self.path = Path()
        self.id: CheckpointId = identity.identify(model)
        self.name, self.sha256, self.family = self.id.name, self.id.sha256, self.id.family
        self.latent_format = type(model.model.latent_format).__name__

    @property
    def encoding_id(self) -> str:
        """VAE, text encoder (`type`, where it stops) and the scale of the model's latents decide what is encoded."""
        parts = [identity.part_id(self._vae.patcher), identity.part_id(self._clip.patcher)]
        parts += [self.latent_format, type(self._clip.cond_stage_model).__name__, str(self._clip.layer_idx)]
        return "native-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "NativeVae":
        return NativeVae(self._vae, self._model.model, self._policy.load if self._policy else lambda: None)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "NativeText":
        return NativeText(self._clip)

    def load_policy(self, checkpoint, recipe: Recipe, with_experts: Sequence[Expert], device, dtype) -> NativePolicy:
        """Return the policy over MODEL: a PolicyLoader (training/policy.py) for this very base.

        Raises:
            InputError: MODEL has no layers of the recipe's targets, or experts are given apart from it.
        """
        if with_experts:
            raise InputError("connect experts to the MODEL with a LoRA loader instead of giving them to the training")
        self._policy = NativePolicy(self._model, recipe)
        return self._policy


def check_base(base: NativeBase, dataset: PreferenceDataset) -> str:
    """Return what to tell the user of a base that is not the dataset's, or "".

    Raises:
        InputError: they draw in different latents, so the pairs say little about this model's own pictures.
    """
    drawn_by = dataset.info.base_checkpoint
    if base.id.is_same_model(drawn_by):
        return ""
    formats = identity.latent_formats(drawn_by.family)
    if formats and base.latent_format not in formats:
        raise InputError(
            f"the dataset was drawn by {drawn_by.name} ({drawn_by.family}), whose latents are not those of "
            f"{base.name} ({base.family}): draw pairs with this MODEL by Generate Preference Pairs"
        )
    return f"Training on {base.name}; the dataset was drawn by {drawn_by.name or 'an unknown model'}."


class NativeText:
    """CLIP as the cache's text encoder."""

    def __init__(self, clip):
        self._clip = clip

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, list[Tensor | None]]:
        """Return name -> one tensor a prompt, without the batch axis; None where a prompt has no such condition."""
        rows = encode_rows(self._clip, prompts)
        return {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}}


class NativeVae:
    """VAE as the cache's image encoder, to and from the model's own latents.

    Args:
        after_decoding: brings the model in training back to its device.
    """

    def __init__(self, vae, model, after_decoding: Callable[[], None]):
        self._vae, self._model, self._after_decoding = vae, model, after_decoding

    def encode_images(self, images: Tensor) -> Tensor:
        """Return latents [b, c, h, w], or [b, c, 1, h, w] of video VAEs, of images [b, 3, h, w] in [0, 1]."""
        latents = []
        for image in images.permute(0, 2, 3, 1).split(1):  # one at a time: a video VAE takes a batch for frames
            with torch.inference_mode():
                latent = self._vae.encode(image)
            refusals.check_latents(self._model, latent)
            if latent.ndim == 4 and self._model.latent_format.latent_dimensions == 3:
                latent = latent.unsqueeze(2)
            if latent.ndim == 5 and self._model.latent_format.latent_dimensions == 2:
                latent = latent.squeeze(2)
            latents.append(self._model.process_latent_in(latent.float().cpu().clone()))
        return torch.cat(latents)

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        """Return one picture for each of the model's latents."""
        pictures = []
        for latent in latents.split(1):
            raw = self._model.process_latent_out(latent.float()).cpu()
            with torch.inference_mode(), kernels.uninterrupted():
                pixels = self._vae.decode(raw)
            values = (pixels.reshape(-1, *pixels.shape[-3:])[0].clamp(0, 1) * 255).round().byte().cpu().numpy()
            pictures.append(Image.fromarray(np.ascontiguousarray(values)))
        self._after_decoding()
        return pictures
