"""After a training: that stock ComfyUI loads every layer of the expert, and changes the MODEL as the training did."""

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from ...errors import SafetyExpertsError
from ...experts.expert import Expert, LoraLayer
from .adapters import LoraAdapter

_RELATIVE = 1e-3  # of the largest change: float32 sums in another order


def check_loads(model, expert: Expert) -> None:
    """Read an expert as the stock loader does and hold its first and last layer's change against the bypass's.

    Raises:
        SafetyExpertsError: a layer is not found, or changes a weight otherwise; the file is kept.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(expert.state_dict()), names)
    missing = [name for name in expert.layers if names.get(name) not in loaded]
    if missing:
        raise SafetyExpertsError(
            f"stock ComfyUI does not find {len(missing)} of {len(expert.layers)} layers of {expert.name}, first "
            f"{missing[0]}: this ComfyUI names them otherwise; please report it with its version"
        )
    for name in {next(iter(expert.layers)), next(reversed(expert.layers))}:
        layer, key = expert.layers[name], names[name]
        nothing = torch.zeros(comfy.utils.get_attr(model.model, key).shape)
        change = comfy.lora.calculate_weight([(1.0, loaded[key], 1.0, None, None)], nothing, key)
        probe = torch.randn(2, change.shape[1], generator=torch.Generator().manual_seed(0))
        stock, bypass = probe @ change.T, _bypass(layer, probe)
        if not (stock - bypass).abs().max() <= _RELATIVE * bypass.abs().max():
            raise SafetyExpertsError(
                f"stock ComfyUI changes {name} of {expert.name} otherwise than it was trained: please report it with "
                "ComfyUI's version"
            )


def _bypass(layer: LoraLayer, probe: torch.Tensor) -> torch.Tensor:
    adapter = LoraAdapter(layer.down, layer.up, layer.alpha)
    with torch.no_grad():
        return adapter.bypass_forward(lambda x: torch.zeros(len(x), len(layer.up)), probe)
