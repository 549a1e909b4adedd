"""The node that draws both images of every prompt pair into a preference dataset."""

from dataclasses import asdict
from functools import partial

import comfy.samplers
from comfy_api.latest import io

from ..errors import InputError
from ..models.denoiser import StartImage
from ..preferences.dataset import DatasetInfo, ImageToImage, NewPair, PreferenceDataset
from . import checks, host, pictures, sampling, sockets
from .native import refusals
from .native.identity import identify
from .sampling import SamplerSettings


class SafetyExpertsGeneratePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsGeneratePairs",
            display_name="Generate Preference Pairs",
            category="safety experts/preferences",
            description=(
                "Draws both images of every prompt pair, from the same seed, into a preference dataset. "
                "Queue it again after a stop and it continues where it was."
            ),
            search_aliases=["build dataset", "DPO dataset"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to make safer."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                sockets.PromptPairs.Input("prompt_pairs", tooltip="From Prompt Pairs or Write Prompt Pairs."),
                io.String.Input("negative_prompt", default="", multiline=True, tooltip="Used for both images."),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip=(
                        "As in the KSampler. Ancestral and SDE samplers draw noise for the whole batch; for an image a "
                        "KSampler can repeat use them with batch_size 1."
                    ),
                ),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in the KSampler."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Of the sampler, for each picture."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance, as in the KSampler.",
                ),
                io.Int.Input("width", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
                io.Int.Input("height", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Images drawn together; lower it if memory is short.",
                ),
                sockets.dataset_name_input(),
                sockets.legacy_checkpoint_input(),
                io.Combo.Input(
                    "preview",
                    options=["off", "blurred", "full"],
                    default="blurred",
                    tooltip="Live picture of the last pair; the unsafe one left, blurred unless the setting says not.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "Below 1 the safe image is drawn from the unsafe one, as by a KSampler with this denoise, so "
                        "that they differ in little else (DUO: 0.75). At 1 both are drawn from noise."
                    ),
                ),
                io.Boolean.Input(
                    "negate_unsafe",
                    default=False,
                    optional=True,
                    tooltip="With a denoise below 1: the unsafe prompt is the safe image's negative prompt, as in DUO.",
                ),
            ],
            outputs=[sockets.Dataset.Output("dataset", tooltip="For Judge, Review and Train.")],
        )

    @classmethod
    def validate_inputs(cls, dataset_name: str | None = None, checkpoint: str | None = None) -> bool | str:
        return checks.first_problem((host.dataset_folder, dataset_name))

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str = "", **inputs: object) -> int:
        return host.own_writes.fingerprint(dataset_name)

    @classmethod
    def execute(
        cls, model, clip, vae, prompt_pairs, negative_prompt, sampler_name, scheduler, steps, cfg, width, height,
        batch_size, dataset_name, checkpoint, preview, denoise=1.0, negate_unsafe=False,
    ) -> io.NodeOutput:  # fmt: skip
        settings = SamplerSettings(sampler_name, scheduler, steps, cfg, width, height)
        how = ImageToImage(denoise, negate_unsafe) if denoise < 1 else None
        if negate_unsafe and not how:
            raise InputError("negate_unsafe needs a denoise below 1: lower it, or switch negate_unsafe off")
        base = identify(model)
        if clip is None:
            raise InputError(f"clip is empty: {base.name} holds no text encoder; load one with CLIPLoader")
        # All this before hours of drawing: pairs that could train no file of this model are not drawn.
        refusals.check_family(model)
        refusals.check_vae(model.model, vae)
        if problem := refusals.problem_of(model):
            host.tell(cls.hidden.unique_id, f"These pairs cannot train this very MODEL: {problem}", "warn")
        info = DatasetInfo(
            base_checkpoint=base,
            sampler=asdict(settings) | {"negative_prompt": negative_prompt},
            prompt_source=", ".join(sorted({pair.source for pair in prompt_pairs if pair.source})),
            licence_note="",
            image_to_image=how,
        )
        dataset = PreferenceDataset.create(host.dataset_folder(dataset_name), info)
        pairs = list({pair.id: pair for pair in prompt_pairs}.values())
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        # The same pairs always together, whatever was drawn before: a picture's last bits may depend on its company.
        todo = [batch for batch in batches if any(pair.id not in dataset.ids for pair in batch)]
        negative = sampling.encode_prompt(clip, negative_prompt)
        is_blurred = preview == "blurred" and host.blurs_unsafe()
        progress = host.Progress(max(1, 2 * steps * sum(map(len, todo))))
        sample = partial(sampling.sample_latents, model, settings=settings, on_image_step=progress.advance)
        for batch in todo:
            seeds = [pair.seed for pair in batch]
            unsafe = [sampling.encode_prompt(clip, pair.prompt) for pair in batch]
            safe = [sampling.encode_prompt(clip, pair.safe_prompt) for pair in batch]
            negatives = [negative] * len(batch)
            latents = sample(unsafe, negatives, seeds)
            rejected = sampling.decode_latents(vae, latents)
            start = StartImage(latents, how.denoise) if how else None
            latents = sample(safe, unsafe if how and how.negates_unsafe else negatives, seeds, start=start)
            chosen = sampling.decode_latents(vae, latents)
            dataset.add_many([NewPair(*parts) for parts in zip(batch, chosen, rejected, strict=True)])
            if preview != "off":
                progress.picture(partial(pictures.side_by_side, rejected[-1], chosen[-1], is_blurred=is_blurred))
        host.own_writes.written(dataset_name)
        return io.NodeOutput(dataset)
