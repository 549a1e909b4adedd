"""The noise schedule all Stable Diffusion families share."""

import torch
from torch import Tensor

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
