"""Co-Merge's activation counts: which expert is the most active in each output row, counted over real inputs.

For one token x and row j the expert with the largest |s_k (B_k A_k x)[j]| gets one count; ties go to the earlier
expert, and where all are exactly zero nobody gets it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..tensor_file import read_tensors, write_tensors
from .expert import Expert, LoraLayer
from .keys import kohya_name

_STATISTICS_KEY = "safety_experts_statistics"
_FORMAT_VERSION = 1
_CHUNK_ELEMENTS = 1 << 22  # token × row products held at once


class ActivationCounter:
    """Counts winners while a model runs; works on any device and dtype (computes in float32), also in inference mode.

    Args:
        experts: their order is the order of the counts and of ties.
    """

    def __init__(self, experts: Sequence[Expert]):
        self.experts = list(experts)
        self.layers = list(dict.fromkeys(name for expert in self.experts for name in expert.layers))
        self._counts: dict[str, Tensor] = {}
        self._placed: dict[tuple[str, torch.device], list[tuple[int, LoraLayer]]] = {}

    @torch.inference_mode()
    def observe(self, layer_name: str, x: Tensor, **convolution) -> None:
        """Count the winners for one input of a layer.

        Args:
            layer_name: kohya name of a layer that at least one expert has.
            x: the layer's input, [..., in], or [b, in, h, w] where the layer is a convolution.
            convolution: stride, padding and dilation of the layer where it is a convolution.

        Raises:
            InputError: the input is not as wide as the experts' layer: they belong to another model.
        """
        layers = self._layers_on(layer_name, x.device)
        num_rows, is_convolution = layers[0][1].up.shape[0], layers[0][1].down.ndim == 4
        width, expected = x.shape[1 if is_convolution else -1], layers[0][1].down.shape[1]
        if width != expected:
            raise InputError(
                f"layer {layer_name} gets {width} channels in this model but takes {expected} in the experts; "
                "use the model that they were trained on"
            )
        if layer_name not in self._counts:
            self._counts[layer_name] = torch.zeros(len(self.experts), num_rows, dtype=torch.int64, device=x.device)
        counts = self._counts[layer_name]
        for tokens in _chunks(x, num_rows, is_convolution=is_convolution):
            tokens = tokens.float()
            index, layer = layers[0]
            best = _activation(layer, tokens, convolution).abs_()
            winner = torch.full(best.shape, index, dtype=torch.int16, device=x.device)
            for index, layer in layers[1:]:
                strength = _activation(layer, tokens, convolution).abs_()
                winner.masked_fill_(strength > best, index)
                torch.maximum(best, strength, out=best)
            winner.masked_fill_(best == 0, -1)
            for index, _ in layers:
                counts[index] += winner.eq(index).sum(dim=0)

    @property
    def counts(self) -> dict[str, Tensor]:
        """Counts by layer, [K, out] int64 on the CPU; layers that were never observed are all zero."""
        rows = {name: layer.up.shape[0] for expert in self.experts for name, layer in expert.layers.items()}
        nothing = {name: torch.zeros(len(self.experts), rows[name], dtype=torch.int64) for name in self.layers}
        return {name: self._counts[name].cpu().clone() if name in self._counts else nothing[name] for name in nothing}

    @contextlib.contextmanager
    def hook_modules(
        self,
        named_modules: Iterable[tuple[str, nn.Module]],
        names_of: Callable[[str], Iterable[str]] = lambda path: (kohya_name(path),),
    ) -> Iterator[None]:
        """Inside, every forward pass of the modules that the experts change is counted.

        Args:
            named_modules: (path, module), such as `unet.named_modules()` of the base model.
            names_of: module path -> names of the layers that see its input: parts of a fused layer are several.

        Raises:
            InputError: none of the modules is a layer of the experts.
        """
        wanted = set(self.layers)
        handles = []
        try:
            for path, module in named_modules:
                for name in wanted.intersection(names_of(path)):
                    handles.append(module.register_forward_pre_hook(self._hook(name, module)))
            if not handles:
                raise InputError(
                    f"no layer of {self.experts[0].name} is in this model, first {self.layers[0]}; "
                    "use the model family that the experts were trained on"
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module):
        convolution = {}
        if isinstance(module, nn.Conv2d):
            convolution = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}

        def observe(_module, inputs):
            self.observe(name, inputs[0], **convolution)

        return observe

    def _layers_on(self, name: str, device: torch.device) -> list[tuple[int, LoraLayer]]:
        if (name, device) not in self._placed:
            self._placed[name, device] = [
                (index, LoraLayer(layer.down.to(device).float(), layer.up.to(device).float(), layer.alpha))
                for index, expert in enumerate(self.experts)
                if (layer := expert.layers.get(name)) is not None
            ]
        return self._placed[name, device]


def save_activation_counts(
    path: str | os.PathLike, counts: Mapping[str, Tensor], experts: Sequence[Expert], calibration: Mapping
) -> None:
    """Write counts as safetensors, with the experts they belong to and what they were calibrated on (JSON values)."""
    description = {
        "format_version": _FORMAT_VERSION,
        "experts": [{"name": expert.name, "tensors_sha256": expert.tensors_sha256()} for expert in experts],
        "calibration": dict(calibration),
    }
    text = json.dumps(description, ensure_ascii=False, sort_keys=True)
    write_tensors(path, counts, {_STATISTICS_KEY: text})


def load_activation_counts(path: str | os.PathLike, experts: Sequence[Expert]) -> dict[str, Tensor]:
    """Read counts for these experts; their order may differ from the file's.

    Raises:
        InputError: not a statistics file, or it was made with other experts.
    """
    tensors, metadata = read_tensors(path)
    if _STATISTICS_KEY not in metadata:
        raise InputError(f"{path} holds no activation statistics; make it with `merge --calibration`")
    description = json.loads(metadata[_STATISTICS_KEY])
    if description["format_version"] != _FORMAT_VERSION:
        raise InputError(f"{path}: statistics format {description['format_version']!r} is not known; update the pack")
    recorded = [entry["tensors_sha256"] for entry in description["experts"]]
    wanted = [expert.tensors_sha256() for expert in experts]
    if sorted(recorded) != sorted(wanted):
        names = ", ".join(entry["name"] for entry in description["experts"])
        raise InputError(f"{path} was calibrated for other experts ({names}); calibrate again for these")
    order = [recorded.index(fingerprint) for fingerprint in wanted]
    return {name: counts[order] for name, counts in tensors.items()}


def _chunks(x: Tensor, num_rows: int, *, is_convolution: bool) -> Iterator[Tensor]:
    """Split an input into groups whose activations fit in _CHUNK_ELEMENTS."""
    if is_convolution:
        size = _CHUNK_ELEMENTS // (num_rows * x.shape[-1] * x.shape[-2])
    else:
        x = x.reshape(-1, x.shape[-1])
        size = _CHUNK_ELEMENTS // num_rows
    yield from x.split(max(size, 1))


def _activation(layer: LoraLayer, x: Tensor, convolution: Mapping) -> Tensor:
    """Return s B A x, [tokens, out]."""
    if layer.down.ndim == 4:
        hidden = functional.conv2d(x, layer.down, **convolution)
        hidden = hidden.flatten(2).transpose(1, 2).reshape(-1, layer.rank)  # [b, r, h, w] -> [b h w, r]
    else:
        hidden = x @ layer.down.T
    return hidden @ (layer.scale * layer.up.flatten(1)).T
