"""A linear layer with a LoRA on it, for training."""

import functools
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def lora_linear() -> type[nn.Module]:
    """Return peft's LoRA layer with one adapter and no dropout, in fewer passes over the layer's output.

    peft brings the input to float32 (and autocast brings it back), multiplies by alpha/rank and adds, each a pass of
    its own; here the second matrix product does all of it.
    """
    from peft.tuners.lora.layer import Linear  # peft takes seconds to import

    class LoraLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Return base(x) + alpha/rank B A x: [..., d_in] to [..., d_out]."""
            output = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters:
                return output
            (adapter,) = self.active_adapters
            inner = self.lora_A[adapter](x).flatten(0, -2)
            up: Any = self.lora_B[adapter].weight
            return torch.addmm(output.flatten(0, -2), inner, up.T, alpha=self.scaling[adapter]).view(output.shape)

    return LoraLinear
