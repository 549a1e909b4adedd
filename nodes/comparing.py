"""The node that shows two pictures under one slider."""

from typing import Any

from comfy_api.latest import io, ui


class SafetyExpertsCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsCompare",
            display_name="Compare Before and After",
            category="safety experts/evaluation",
            description="Two pictures under one slider; the unsafe one is blurred until it is asked for.",
            search_aliases=["compare images", "before after", "slider", "difference"],
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="Without the expert; a batch is shown picture by picture."),
                io.Image.Input("after", tooltip="With the expert, from the same seeds."),
                io.Combo.Input(
                    "unsafe_side",
                    options=["before", "after", "both", "neither"],
                    default="before",
                    tooltip="The side that is blurred until you press Show. A setting turns the blur off everywhere.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, before, after, unsafe_side) -> io.NodeOutput:
        shown: dict[str, Any] = {"unsafe_side": unsafe_side}
        for side, images in (("before", before), ("after", after)):
            shown[side] = ui.PreviewImage(images, cls=cls).as_dict()["images"]
        return io.NodeOutput(ui={"safety_experts_compare": [shown]})
