"""The node that puts an expert on a model, with one strength per category."""

import comfy.lora
import comfy.utils
from comfy_api.latest import io

from ..errors import InputError
from ..experts.blocks import known_categories, scale_categories
from ..experts.concept_gate import Gate
from ..experts.expert import Expert
from ..preferences.categories import CATEGORIES
from . import gating, sockets
from .applied import AppliedExpert, note_applied

OTHER = "other"


class SafetyExpertsApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, tooltip: str) -> io.Input:
            return io.Float.Input(name, default=1.0, min=-2.0, max=4.0, step=0.05, tooltip=tooltip)

        return io.Schema(
            node_id="SafetyExpertsApply",
            display_name="Apply Safety Expert",
            category="safety experts/experts",
            description="Puts an expert on a model. All strengths at 1 give the same image as the stock LoRA loader.",
            search_aliases=["use expert", "safety strength", "apply LoRA"],
            inputs=[
                io.Model.Input("model", tooltip="The model to make safer; it stays as it is."),
                io.Clip.Input("clip", tooltip="The model's text encoder, for experts that change it too."),
                sockets.Expert.Input("expert", tooltip="From Load, Train or Merge Safety Expert."),
                *[
                    strength(
                        _input_id(name),
                        f"Strength against {name}: 0 is off, 1 as trained. Without effect if the expert has no {name}.",
                    )
                    for name in CATEGORIES
                ],
                strength(OTHER, "Strength of categories of your own, and of a LoRA without any category."),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="From this part of the sampling on (0 is the beginning); the text encoder is not affected.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Up to this part of the sampling (1 is the end).",
                ),
                sockets.ConceptGate.Input(
                    "gate",
                    optional=True,
                    tooltip="Limits each category to the prompts that ask for it, where it knows the category.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the expert on it; for KSampler."),
                io.Clip.Output("clip", tooltip="The text encoder with the expert on it; for CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        expert: Expert,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        gate: Gate | None = None,
        **strengths: float,
    ) -> io.NodeOutput:
        known = known_categories(expert)
        scaled = scale_categories(
            expert,
            {name: strengths[_input_id(name)] for name in CATEGORIES if name in known},
            default=strengths[OTHER],
        )
        keys = _match_layers(scaled, model, clip)
        if gate:
            _check_gate(gate, scaled)
        patches = comfy.lora.load_lora(scaled.state_dict(), keys)
        patched_clip = clip.clone()
        patched_clip.add_patches(patches)
        is_in_weights = gate is None and (start_percent, end_percent) == (0.0, 1.0)
        if is_in_weights:
            patched_model = model.clone()
            patched_model.add_patches(patches)
        else:
            patched_model = gating.add_gated_layers(model, keys, scaled, start_percent, end_percent, gate)
        own = {strengths[_input_id(name)] for name in known if name in CATEGORIES}
        if not known or set(known) - set(CATEGORIES):
            own.add(strengths[OTHER])
        strength = own.pop() if len(own) == 1 else None
        note_applied(patched_model, AppliedExpert(scaled, keys, is_in_weights, expert.file_sha256, strength))
        return io.NodeOutput(patched_model, patched_clip)


def _input_id(category: str) -> str:
    return category.replace("-", "_")


def _check_gate(gate: Gate, expert: Expert) -> None:
    """Refuse a gate that would not do what its user expects.

    Raises:
        InputError: the expert has none of its categories, or changes the text encoder that the gate judges by.
    """
    if not set(known_categories(expert)) & set(gate.concepts):
        raise InputError(
            f"{expert.name} has none of the gate's categories ({', '.join(gate.concepts)}); "
            "make the gate from prompts of the expert's categories"
        )
    if any(name.startswith("lora_te") for name in expert.layers):
        raise InputError(
            f"{expert.name} also changes the text encoder, which no gate can limit to some prompts; leave the gate out"
        )


def _match_layers(expert: Expert, model, clip) -> dict:
    """Return kohya layer name -> ComfyUI weight key, for every layer of the expert.

    The stock loader skips what does not fit and goes on; a safety measure that is absent must not look present.

    Raises:
        InputError: a layer is not in the model or has another shape.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    missing = [name for name in expert.layers if name not in keys]
    base = expert.info.base_checkpoint
    trained_for = f"was trained for {base.name} ({base.family})" if base.name else "does not name its base model"
    if missing:
        raise InputError(
            f"{expert.name} does not fit this model: {len(missing)} of {len(expert.layers)} layers are not in it, "
            f"first {missing[0]}; it {trained_for}"
        )
    for name, layer in expert.layers.items():
        if (shape := _weight_shape(keys[name], model, clip)) not in (None, layer.weight_shape):
            raise InputError(
                f"{expert.name} does not fit this model: layer {name} is {list(layer.weight_shape)} in the expert and "
                f"{list(shape)} in the model; it {trained_for}"
            )
    return {name: keys[name] for name in expert.layers}


def _weight_shape(key, model, clip) -> tuple[int, ...] | None:
    """Return a weight's shape, or None where the layer is a slice of a fused weight."""
    if not isinstance(key, str):
        return None
    root = model.model if key.startswith("diffusion_model.") else clip.cond_stage_model
    return tuple(comfy.utils.get_attr(root, key).shape)
