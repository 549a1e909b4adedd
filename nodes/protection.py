"""The node that keeps a style LoRA from undoing safety experts."""

from comfy_api.latest import io

from ..experts.expert import Expert
from ..experts.overlap import overlap, overlap_table
from ..experts.protection import SPACES, kept_energy, protect
from . import host, sockets
from .experts import MAX_EXPERTS


class SafetyExpertsProtect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        experts = io.Autogrow.TemplatePrefix(
            sockets.Expert.Input("expert", tooltip="From Load or Train Safety Expert."),
            prefix="expert_",
            min=1,
            max=MAX_EXPERTS,
        )
        return io.Schema(
            node_id="SafetyExpertsProtect",
            display_name="Protect Safety Experts",
            category="safety experts/experts",
            description="Reports how much a style LoRA cancels safety experts, and removes that part from the style.",
            search_aliases=["style LoRA", "modular LoRA", "orthogonal LoRA"],
            inputs=[
                sockets.Expert.Input("style", tooltip="Any LoRA, from Load Safety Expert."),
                io.Autogrow.Input("experts", template=experts, tooltip="The experts that the style must not cancel."),
                io.Combo.Input(
                    "space",
                    options=list(SPACES),
                    tooltip="Remove what writes where the experts write (output), reads where they read, or both.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 leaves the style as it is, 1 removes all of that part.",
                ),
            ],
            outputs=[
                sockets.Expert.Output(
                    "expert",
                    display_name="protected style",
                    tooltip="The style less what would cancel the experts; for Apply or Save.",
                ),
                io.String.Output("report", tooltip="A table, a line for each layer; show it with Preview as Text."),
            ],
        )

    @classmethod
    def execute(cls, style: Expert, experts: dict, space: str, strength: float) -> io.NodeOutput:
        in_order = [experts[name] for name in sorted(experts, key=lambda name: int(name.rpartition("_")[2]))]
        tables = []
        for expert in in_order:
            found = overlap(expert, style)
            tables.append(overlap_table(expert, style, found, list(found)))
        protected = protect(style, in_order, space=space, strength=strength, on_layer=host.Progress().show)
        return io.NodeOutput(
            protected, "\n\n".join([*tables, f"kept: {kept_energy(style, protected):.2%} of the style"])
        )
