"""Families of transformers under rectified flow: what they share, where a diffusers weight lies in a native file."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, FlowError
from .family import Family, Layout
from .flow import FlowDenoiser
from .noise_schedule import FlowNoise, Noise
from .weights_file import WeightsFile, fill

AnyLayout = TypeVar("AnyLayout", bound=Layout)


@dataclass(frozen=True)
class NativeWeight:
    """A diffusers weight in a native file: the rows of `key` (None: all); `swapped`: its two halves change places."""

    key: str
    rows: slice | None = None
    swapped: bool = False


class TransformerFamily(Family[AnyLayout]):
    """What they share; a subclass says how its layout is read, its weights are named and its model is called.

    Attributes:
        denoiser_class: how the model is called.
    """

    part, latent_channels = "transformer", 16
    denoiser_class: type[FlowDenoiser]

    @abstractmethod
    def config(self, layout: AnyLayout) -> dict[str, Any]:
        """Return the arguments of the diffusers class for a layout."""

    @abstractmethod
    def native_weight(self, key: str, layout: AnyLayout) -> NativeWeight:
        """Return where a weight of the diffusers model lies in a native file (without prefix)."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == self.diffusers_class

    def folder_noise(self, scheduler: Mapping[str, Any], where: str) -> FlowNoise:
        return FlowNoise(float(scheduler.get("shift", 1.0)))

    def build(self, layout: AnyLayout) -> nn.Module:
        """Return the diffusers model of this layout on the meta device (no weights yet)."""
        import diffusers  # imported where needed: it takes seconds

        with torch.device("meta"):
            return getattr(diffusers, self.diffusers_class)(**self.config(layout))

    def load(
        self, file: WeightsFile, prefix: str, layout: AnyLayout, dtype: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        def read(key: str) -> Tensor:
            weight = self.native_weight(key, layout)
            tensor = file.tensor(self.spelling(prefix + weight.key, file))
            if weight.rows is not None:
                return tensor[weight.rows].clone()  # a view would keep the other rows in memory
            return torch.cat(tensor.chunk(2)[::-1]) if weight.swapped else tensor

        transformer = self.build(layout)
        fill(transformer, read, dtype, device, file.path)
        return transformer

    def spelling(self, key: str, file: WeightsFile) -> str:
        """Return how this file spells a native key, where a family's files do not all agree."""
        return key

    def make_denoiser(
        self, model: nn.Module, noise: Noise, autocast_dtype: torch.dtype | None, flow_error: FlowError
    ) -> Denoiser:
        assert isinstance(noise, FlowNoise)
        return self.denoiser_class(model, noise.shift, autocast_dtype, flow_error)
