"""What a single file and a diffusers folder answer alike once their family is known (meanings: checkpoint.py)."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from ..checkpoint_id import CheckpointId
from .denoiser import Denoiser, FlowError
from .family import Family
from .noise_schedule import Noise


class OpenedCheckpoint(ABC):
    """The common part of both Checkpoints."""

    path: Path
    family: str
    noise: Noise
    _family: Family

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def prediction_type(self) -> str:
        return self.noise.prediction_type

    @property
    def id(self) -> CheckpointId:
        return CheckpointId(name=self.name, sha256=self.sha256, family=self.family)

    @property
    def encoding_id(self) -> str:
        return self.sha256[:16]

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Return the hash that names its weights."""

    def make_denoiser(
        self, model: nn.Module, autocast_dtype: torch.dtype | None = None, flow_error: FlowError = "velocity"
    ) -> Denoiser:
        return self._family.make_denoiser(model, self.noise, autocast_dtype, flow_error)

    def __repr__(self) -> str:
        return f"<{self.family} checkpoint {self.name}>"
