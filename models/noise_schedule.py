"""The two kinds of noise: Stable Diffusion's discrete schedule, and rectified flow."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")
FLOW = "flow"
NUM_TIMESTEPS = 1000
BETAS_FIRST_LAST = (0.00085, 0.012)


def alphas_cumprod(*, zero_terminal_snr: bool = False) -> Tensor:
    """Return alpha-bar of the 1000 training steps, [1000] float32; betas are "scaled linear", 0.00085 to 0.012.

    sqrt(beta_t) runs linearly; alpha-bar_t = product of (1 - beta_s) over s <= t.

    Args:
        zero_terminal_snr: shift and scale sqrt(alpha-bar) so that the last step is (almost) pure noise, as ComfyUI
            does for checkpoints with a `ztsnr` key.

    Source: CompVis/stable-diffusion; zero terminal SNR: arXiv 2305.08891, algorithm 1.
    """
    first, last = BETAS_FIRST_LAST
    betas = torch.linspace(first**0.5, last**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        alphas[-1] = 4.8973451890853435e-08  # ComfyUI's stand-in for zero, which has no finite noise level
    return alphas.float()


@dataclass(frozen=True)
class DiscreteNoise:
    """Stable Diffusion's noise: alpha-bar of the 1000 training steps, [1000] float32, and what the UNet predicts."""

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def predicting(self, prediction_type: str, where: str) -> "DiscreteNoise":
        """Return the same schedule with another prediction.

        Raises:
            InputError: it cannot be trained; the message begins with `where`.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"{where} is {prediction_type!r}; only {' and '.join(PREDICTION_TYPES)} can be trained")
        return replace(self, prediction_type=prediction_type)


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow's noise: `shift` says how far the levels lie on the noisy side (see flow.py)."""

    shift: float
    prediction_type: ClassVar[str] = FLOW

    def predicting(self, prediction_type: str, where: str) -> "FlowNoise":
        raise InputError(f"{where} cannot be chosen: this model predicts a flow's velocity; leave prediction_type out")


Noise = DiscreteNoise | FlowNoise
