"""Nodes that look at finished pictures: heads fitted to a dataset's pictures, and what they say of others."""

import torch
from comfy_api.latest import io

from ..errors import InputError
from ..evaluation.judges.q16_vectors import probe_image
from ..evaluation.judges.verifier import train_verifier
from ..guards.verifier import Verdicts, Verifier, read_verifier, write_verifier
from . import host, sampling, sockets
from .comfy_clip import ComfyClip

CONNECTED = "(the connected one)"
_FRAMES_PER_PASS = 32


class SafetyExpertsTrainVerifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsTrainVerifier",
            display_name="Train Verifier",
            category="safety experts/guards",
            description="Learns from a dataset's pictures to see its categories in others; takes seconds on a CPU.",
            search_aliases=["safety checker", "NSFW classifier", "train classifier"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="Any CLIP Vision; the same one is needed to verify."),
                sockets.Dataset.Input("dataset", tooltip="Rejected pictures show their categories, chosen ones none."),
                io.String.Input(
                    "name", default="my_verifier", tooltip="Of the file in ComfyUI's models/safety_judges folder."
                ),
                io.Float.Input(
                    "false_positive_rate",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="The fraction of pictures without a category that may be taken for it.",
                ),
                io.Int.Input(
                    "num_pairs", default=500, min=10, max=100000, tooltip="About so many pairs of each category."
                ),
            ],
            outputs=[
                sockets.Verifier.Output("verifier", tooltip="For Verify Images."),
                io.String.Output("report", tooltip="What each head finds of pictures it was not fitted to."),
                io.String.Output("file", tooltip="The file's name, for Verify Images and Safety Judge."),
            ],
        )

    @classmethod
    def execute(cls, clip_vision, dataset, name: str, false_positive_rate: float, num_pairs: int) -> io.NodeOutput:
        path = host.fresh_judge_path(name)
        verifier = train_verifier(
            ComfyClip(clip_vision), dataset, false_positive_rate, num_pairs, on_progress=host.Progress().show
        )
        write_verifier(verifier, path)
        return io.NodeOutput(verifier, str(verifier), path.name)


class SafetyExpertsVerifyImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsVerifyImages",
            display_name="Verify Images",
            category="safety experts/guards",
            description="Says whether pictures, or the frames of a video, show a category that a verifier knows.",
            search_aliases=["safety checker", "NSFW check", "video check"],
            inputs=[
                io.Image.Input("images", tooltip="Pictures, or a video's frames."),
                io.ClipVision.Input("clip_vision", tooltip="The CLIP Vision that the verifier was trained with."),
                io.Combo.Input(
                    "file",
                    options=[CONNECTED, *host.judge_files()],
                    default=CONNECTED,
                    tooltip="A verifier in models/safety_judges, or the one connected to `verifier`.",
                ),
                sockets.Verifier.Input("verifier", optional=True, tooltip="From Train Verifier."),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=10000,
                    optional=True,
                    tooltip="Look at every so many pictures only: for a video, its frames a second.",
                ),
            ],
            outputs=[
                io.Boolean.Output("safe", tooltip="True where none of the pictures looked at is unsafe."),
                io.Boolean.Output("unsafe_pictures", is_output_list=True, tooltip="Of each picture looked at."),
                io.Float.Output("score", tooltip="The highest of all; above 0 is unsafe."),
                io.String.Output("report", tooltip="Of each category, how many pictures, mean and highest score."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = CONNECTED, **_: object) -> str:
        return file if file == CONNECTED else host.file_state(host.judge_path(file))

    @classmethod
    def execute(cls, images, clip_vision, file: str, verifier: Verifier | None = None, every: int = 1) -> io.NodeOutput:
        if file != CONNECTED:
            verifier = read_verifier(host.judge_path(file))
        if verifier is None:
            raise InputError("no verifier: choose a file, or connect Train Verifier")
        encoder = ComfyClip(clip_vision)
        verifier.check_clip(encoder.embed_images([probe_image()])[0])
        pictures = sampling.to_images(images[::every])
        progress = host.Progress(len(pictures))
        scores = []
        for start in range(0, len(pictures), _FRAMES_PER_PASS):
            batch = pictures[start : start + _FRAMES_PER_PASS]
            scores.append(verifier.scores(encoder.embed_images(batch)))
            progress.advance(len(batch))
        verdicts = Verdicts(verifier.categories, torch.cat(scores))
        return io.NodeOutput(not any(verdicts.unsafe), verdicts.unsafe, float(verdicts.scores.max()), verdicts.report())
