"""LoHa and LoKr layers as plain LoRA layers, without ever forming their dense ΔW.

LoHa: ΔW = s (U_1 D_1) ∘ (U_2 D_2). Its factors are the products of all pairs of columns of U_1 and U_2 and of rows of
D_1 and D_2 (rank ≤ r²), then truncated. LoKr: ΔW = s C ⊗ D. Its singular vectors are Kronecker products of those of C
and D, its singular values all products of theirs, so the largest are picked.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..typed import printable
from .expert import Expert, LoraLayer, checked_layer
from .info import Converted, read_info
from .keys import MAX_KEY, has_second_encoder, layer_name, read_alpha, read_lora_keys
from .truncation import Truncated, check_truncation, keep_leading, truncate_factors

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|alpha)")
_CONVOLUTION_3X3 = re.compile(r".*_(conv|conv1|conv2|conv_in|conv_out)$")


def convert_lycoris(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str, *, rank: int, energy: float = 1.0
) -> Expert:
    """Return a LoHa or LoKr file as an expert; plain LoRA layers in it are taken as they are.

    Args:
        rank: largest rank of a converted layer.
        energy: keep no more ranks than hold this fraction of a layer's squared change.
        name: of the expert, and in errors.

    Raises:
        InputError: a layer is incomplete, of wrong shapes or not finite, is DoRA, or is spelled in no known way.
    """
    check_truncation(rank, energy)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if len(key) <= MAX_KEY and (match := _KEY.fullmatch(key)):
            groups.setdefault(match["path"], {})[match["part"]] = tensor
    groups = {path: parts for path, parts in groups.items() if parts.keys() != {"alpha"}}
    own = {f"{path}.{part}" for path, parts in groups.items() for part in parts}
    rest = {key: tensor for key, tensor in tensors.items() if key not in own}
    layers = {}
    if rest or not groups:
        for plain_name, plain in read_lora_keys(rest, metadata, name).items():
            layers[plain_name] = checked_layer(plain, plain_name, name)
    two_encoders, retained = has_second_encoder(tensors), {}
    for path, parts in groups.items():
        module = layer_name(path, two_encoders)
        if module is None:
            raise InputError(f"{name}: layer {path!r} is spelled in no known way; kohya and diffusers names are read")
        _check_parts(parts, f"{name}: layer {printable(path, 200)}")
        try:
            truncated, shape = (_convert_loha if "hada_w1_a" in parts else _convert_lokr)(parts, module, rank, energy)
        except KeyError as error:
            raise InputError(f"{name}: layer {path} lacks {error.args[0]}; the file is incomplete") from error
        except (RuntimeError, ValueError, IndexError) as error:  # shapes that do not go together
            raise InputError(f"{name}: layer {path} has parts that do not fit together; use another copy") from error
        if truncated is not None:
            layers[module] = LoraLayer.from_matrices(truncated.up, truncated.down, shape)
            retained[module] = round(truncated.retained_energy, 6)
    info = read_info(metadata, name)
    origin = Converted(rank=rank, energy=energy, retained_energy=retained, before=info.origin)
    return Expert(layers, info.model_copy(update={"origin": origin}), name)


def _check_parts(parts: Mapping[str, Tensor], where: str) -> None:
    for part, tensor in parts.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InputError(f"{where}: {part} has the type {str(tensor.dtype)[6:]}; save it as F16 or F32")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {part} holds NaN or infinite numbers; use another copy")
        if part == "alpha":
            read_alpha(tensor, where)
        elif tensor.ndim < 2 or not tensor.numel():
            raise InputError(f"{where}: {part} has the shape {list(tensor.shape)}; use another copy")


def _convert_loha(parts: Mapping[str, Tensor], module: str, rank: int, energy: float):
    size = parts["hada_w1_b"].shape[0]
    up_1, down_1 = _factors(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
    up_2, down_2 = _factors(parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
    inner = tuple(down_1.shape[1:])
    if len(inner) == 1 and _CONVOLUTION_3X3.match(module):
        inner = (inner[0] // 9, 3, 3)  # stored flat
    down_1, down_2 = down_1.flatten(1), down_2.flatten(1)
    up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)  # [out, r_1 r_2]
    down = (down_1[:, None] * down_2[None]).flatten(0, 1)  # [r_1 r_2, in]
    scale = float(parts["alpha"]) / size if "alpha" in parts else 1.0
    return truncate_factors(scale * up, down, rank, energy), (up.shape[0], *inner)


def _convert_lokr(parts: Mapping[str, Tensor], module: str, rank: int, energy: float):
    size = None
    if "lokr_w1" in parts:
        first = parts["lokr_w1"].double()
    else:
        size = parts["lokr_w1_b"].shape[0]
        first = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    if "lokr_w2" in parts:
        second = parts["lokr_w2"].double()
    else:
        size = parts["lokr_w2_b"].shape[0]
        up, down = _factors(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
        second = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    scale = float(parts["alpha"]) / size if "alpha" in parts and size else 1.0
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
    return _truncate_kronecker(scale * first, second.flatten(1), rank, energy), shape


def _factors(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (up [out, r], down [r, in, …]) of a product a @ b, or of Tucker's core with a [r, out] and b [r, in]."""
    a, b = a.double(), b.double()
    if core is None:
        return a, b
    return a.T, torch.einsum("ijkl,jn->inkl", core.double(), b)


def _truncate_kronecker(first: Tensor, second: Tensor, rank: int, energy: float) -> Truncated | None:
    u_1, s_1, v_1 = torch.linalg.svd(first, full_matrices=False)
    u_2, s_2, v_2 = torch.linalg.svd(second, full_matrices=False)
    products = torch.outer(s_1, s_2).flatten()
    order = products.argsort(descending=True, stable=True)[:rank]
    i, j = order // len(s_2), order % len(s_2)
    u = torch.einsum("or,pr->opr", u_1[:, i], u_2[:, j]).flatten(0, 1)
    vh = torch.einsum("rm,rn->rmn", v_1[i], v_2[j]).flatten(1)
    return keep_leading(u, products[order], vh, float(products.square().sum()), rank, energy)
