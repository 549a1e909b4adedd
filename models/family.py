"""What a family of base models says of itself: how weights show it, how it is loaded, noised, conditioned, sampled."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from .denoiser import Denoiser, FlowError
from .noise_schedule import Noise
from .t5 import T5Tower
from .text_encoders import ClipKind, ClipTower, TextEncoder
from .weights_file import WeightsFile

Shapes = Mapping[str, tuple[int, ...]]


class Layout(Protocol):
    """What weights' names and shapes say of a model; each family has its own, all have these."""

    @property
    def context_dim(self) -> int:
        """Width of the text that goes in."""

    @property
    def in_channels(self) -> int:
        """Latent channels that go in; more than the family's in inpainting and editing models."""


AnyLayout = TypeVar("AnyLayout", bound=Layout)


@dataclass(frozen=True)
class T5Kind:
    """How a family uses T5, which single files hold under `text_encoders.t5xxl.`."""

    num_tokens: int
    number: int
    """Of the text encoder and its tokenizer in a diffusers folder."""
    required: bool


class Family(ABC, Generic[AnyLayout]):
    """A family of base models: everything that is not the same for all of them. A new one is a class and a line.

    Attributes:
        name: as it stands in the files that name their base model.
        diffusers_class: of its UNet or transformer.
        part: the subfolder of a diffusers folder that holds it.
        latent_channels, latent_scale, latent_shift: what it draws in; (VAE latents - shift) · scale.
        towers: the CLIP text encoders in order, each with the prefixes it is found under in single files.
        t5: None where there is none.
    """

    name: str
    diffusers_class: str
    part: str
    latent_channels: int
    latent_scale: float
    latent_shift: float = 0.0
    towers: tuple[tuple[ClipKind, tuple[str, ...]], ...]
    t5: T5Kind | None = None

    @abstractmethod
    def infer(self, shapes: Shapes) -> AnyLayout | None:
        """Return the layout of a single file's weights (keys without prefix); None where they are another family's."""

    @abstractmethod
    def matches(self, config: Mapping[str, Any]) -> bool:
        """Say whether this is the config of the family's model in a diffusers folder."""

    def config_channels(self, config: Mapping[str, Any]) -> int:
        """Return the latent channels that a diffusers model takes."""
        return config.get("in_channels", self.latent_channels)

    @abstractmethod
    def file_noise(self, file: WeightsFile, prefix: str, layout: AnyLayout) -> Noise:
        """Return the noise that a single file was trained under, as ComfyUI infers it.

        Raises:
            InputError: it cannot be trained here.
        """

    @abstractmethod
    def folder_noise(self, scheduler: Mapping[str, Any], where: str) -> Noise:
        """Return the noise that a diffusers scheduler's config says; `where` is named in errors.

        Raises:
            InputError: it cannot be trained here.
        """

    @abstractmethod
    def load(
        self, file: WeightsFile, prefix: str, layout: AnyLayout, dtype: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        """Return the diffusers model with the weights under `prefix` of a single file, frozen.

        Raises:
            InputError: a weight is missing or has another shape than the layout asks for.
        """

    @abstractmethod
    def make_denoiser(
        self, model: nn.Module, noise: Noise, autocast_dtype: torch.dtype | None, flow_error: FlowError
    ) -> Denoiser:
        """Return what noises and predicts with the model; see `Checkpoint.make_denoiser`."""

    def join(self, towers: Sequence[ClipTower], t5: T5Tower | None, context_dim: int) -> TextEncoder:
        """Return the text encoders as one; `context_dim` is the width that the model takes."""
        return TextEncoder(towers)
