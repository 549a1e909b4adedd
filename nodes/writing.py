"""A node that lets a language model write prompt pairs."""

import os
from pathlib import Path

from comfy_api.latest import io

from ..endpoint import Endpoint, Request
from ..errors import InputError
from ..plain_yaml import load_yaml
from ..preferences.records import refuse_links
from ..preferences.unsafe_prompts import parse_unsafe_prompts, read_unsafe_prompts
from ..preferences.writing import check_concepts, write_pairs, write_safe_sides
from . import host, sockets

ALLOW_REMOTE_VARIABLE = "SAFETY_EXPERTS_ALLOW_REMOTE"
NO_PROMPTS = {"unsafe_prompts": "none"}
EXAMPLE = "violence: [thorns, spikes]\nhate: [stripes]\n"


class SafetyExpertsWritePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        server: list[io.Input] = [
            io.String.Input(
                "url", default="http://127.0.0.1:11434/v1", tooltip="OpenAI-compatible address on this machine."
            ),
            io.String.Input("model", default="", tooltip="Name of a model that the server has."),
        ]
        clip: list[io.Input] = [
            io.Clip.Input("clip", tooltip="A text-generation model, as core's Generate Text takes it.")
        ]
        category = io.String.Input(
            "category", default="", tooltip="Of prompts that name none themselves; several with commas between."
        )
        lines = io.String.Input("text", multiline=True, default="", tooltip="One unsafe prompt a line.")
        file = io.Combo.Input(
            "file",
            options=host.prompt_files(host.UNSAFE_FILE_SUFFIXES),
            tooltip="A .csv with a column `prompt` and perhaps `categories` (I2P's), or a .txt with a prompt a line, "
            "in ComfyUI's input or datasets folder. Refresh after adding one.",
        )
        return io.Schema(
            node_id="SafetyExpertsWritePairs",
            display_name="Write Prompt Pairs",
            category="safety experts/preferences",
            description="Lets a language model that you run write pairs of an unsafe and a safe prompt close to it, or "
            "the safe side of unsafe prompts you have.",
            search_aliases=["LLM", "generate prompts", "taxonomy", "Ollama", "I2P", "safe prompt"],
            inputs=[
                io.DynamicCombo.Input(
                    "writer",
                    options=[
                        io.DynamicCombo.Option("server", server),
                        io.DynamicCombo.Option("text model", clip),
                    ],
                    tooltip="A server such as Ollama, llama.cpp or vLLM, or a text model loaded in this graph.",
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="YAML: for each category the words that make a picture of it.",
                ),
                io.Int.Input("number", default=10, min=1, max=10000, tooltip="Pairs for each concept."),
                sockets.dataset_name_input(),
                io.DynamicCombo.Input(
                    "unsafe_prompts",
                    options=[
                        io.DynamicCombo.Option("none", []),
                        io.DynamicCombo.Option("text", [lines, category]),
                        io.DynamicCombo.Option("file", [file, category]),
                    ],
                    optional=True,
                    tooltip="Unsafe prompts that only need their safe side: `concepts` and `number` are not used then.",
                ),
            ],
            outputs=[
                sockets.PromptPairs.Output("prompt_pairs", tooltip="For Generate Preference Pairs."),
                io.String.Output("summary", tooltip="How many there are, what was left out and why, what is missing."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, unsafe_prompts: dict | None = None, **inputs: object) -> str:
        given = unsafe_prompts or NO_PROMPTS
        return host.file_state(host.prompt_file(given["file"])) if given["unsafe_prompts"] == "file" else ""

    @classmethod
    def execute(
        cls, writer: dict, concepts: str, number: int, dataset_name: str, unsafe_prompts: dict | None = None
    ) -> io.NodeOutput:
        given = unsafe_prompts or NO_PROMPTS
        folder = host.dataset_folder(dataset_name)
        refuse_links(folder)
        out = Path(folder) / "prompt_pairs.jsonl"
        progress = host.PatientProgress(1)
        if given["unsafe_prompts"] == "none":
            wanted = check_concepts(load_yaml(concepts, "concepts"), "concepts")
            written = write_pairs(
                _model(writer),
                wanted,
                out,
                number=number,
                on_progress=progress.show,
                should_stop=progress.is_cancelled,
            )
        else:
            prompts = _unsafe_prompts(given)
            written = write_safe_sides(
                _model(writer), prompts, out, on_progress=progress.show, should_stop=progress.is_cancelled
            )
        progress.raise_cancel()
        lines = [f"{len(written.pairs)} prompt pairs"]
        lines += [f"left out: {count}, {problem}" for problem, count in written.refused.most_common()]
        lines += [f"not written: {count} for {what}" for what, count in written.missing.items()]
        if not written.pairs:
            raise InputError(f"the model wrote no pair that can be used ({'; '.join(lines[1:])}): try another model")
        return io.NodeOutput(sockets.PromptPairList(written.pairs), "\n".join(lines))


def _unsafe_prompts(given: dict) -> list[tuple[str, tuple[str, ...]]]:
    category = given["category"] or ""
    if given["unsafe_prompts"] == "text":
        return parse_unsafe_prompts(given["text"] or "", category)
    return read_unsafe_prompts(host.prompt_file(given["file"]), category)


def _model(writer: dict):
    if writer["writer"] == "text model":
        return ComfyTextModel(writer["clip"])
    if not (writer["model"] or "").strip():
        raise InputError("model is empty: name a model that the server has")
    # Whether prompts may leave this machine is not for a workflow to say.
    return Endpoint(writer["url"], writer["model"].strip(), os.environ.get(ALLOW_REMOTE_VARIABLE) == "1")


class ComfyTextModel:
    """A text-generation model of the graph, asked as core's node Generate Text does."""

    name = "a text model in ComfyUI"

    def __init__(self, clip):
        if not all(hasattr(clip, name) for name in ("generate", "decode")):
            raise InputError("this ComfyUI has no text generation: update it, or use a server")
        self._clip = clip

    def complete(self, request: Request) -> str:
        host.stop_if_cancelled()
        tokens = self._clip.tokenize(request.messages[0]["content"], min_length=1)
        sampling = {
            "do_sample": request.temperature > 0,
            "temperature": request.temperature or 1.0,
            "seed": request.seed,
        }
        try:
            found = self._clip.generate(tokens, max_length=request.max_tokens, **sampling)
        except AttributeError as error:  # what an image model's text encoder says
            raise InputError("this CLIP writes no text: load a text-generation model, or use a server") from error
        return self._clip.decode(found)
