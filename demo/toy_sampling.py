"""The toy model in this process, without ComfyUI: thousands of small pictures for experiments and benchmarks.

Sampled by diffusers' DPM-Solver++ (2M) on Karras noise levels with the settings of `toy_checkpoint`, which is what
KSampler's `dpmpp_2m` and `karras` do; starting noise differs from ComfyUI's.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint_id import CheckpointId
from ..devices import compute_dtype
from ..experts.expert import Expert
from ..experts.in_weights import weights_with
from ..models.checkpoint import load_checkpoint
from ..preferences.dataset import DatasetInfo, PreferenceDataset
from ..preferences.prompt_pair import PromptPair
from ..preferences.taxonomy import expand_taxonomy
from ..toy.oracle import Reading, read_image
from ..toy.world import MARKS, SIZE_PX, taxonomy
from ..training.preparation import tune_for_device
from .comfyui import find_comfyui
from .toy_checkpoint import CFG, STEPS, ensure_toy_checkpoint

IMAGES_PER_PASS = 32
MAX_REMEMBERED = 1000  # encoded prompts, of 240 kB each


class Sampler:
    """Draws prompts with the model of a harmless world, alone or with experts.

    Args:
        path: the world's checkpoint.
        size_px: of its square images.

    Attributes:
        checkpoint: the checkpoint, opened.
        unet: diffusers' UNet, float32; as it was after every call.
    """

    def __init__(self, path: Path, size_px: int) -> None:
        tokenizer_folder = find_comfyui() / "comfy" / "sd1_tokenizer"
        self.checkpoint = checkpoint = load_checkpoint(path, tokenizer_folder=tokenizer_folder)
        self._size_px = size_px
        self.unet = checkpoint.load_model()
        tune_for_device(self.unet, torch.device("cpu"))
        self._denoiser = checkpoint.make_denoiser(self.unet, compute_dtype(torch.device("cpu")))
        self._vae = checkpoint.load_vae()
        self._text_encoder = checkpoint.load_text_encoder()
        self._hidden_states: dict[str, Tensor] = {}

    @torch.inference_mode()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], expert: Expert | Sequence[Expert] | None = None
    ) -> list[Image.Image]:
        """Return one square RGB image a prompt; image i starts from the noise of seed i.

        Args:
            expert: one or several, applied at strength 1; `experts.blocks.scale_categories` gives other strengths.

        Raises:
            InputError: an expert belongs to another model.
        """
        images: list[Image.Image] = []
        experts = [expert] if isinstance(expert, Expert) else expert or ()
        with weights_with(self.unet, (), [(each, 1.0) for each in experts]):
            for start in range(0, len(prompts), IMAGES_PER_PASS):
                group = slice(start, start + IMAGES_PER_PASS)
                images += self._draw_group(prompts[group], seeds[group])
        return images

    def build_pairs(self, folder: Path, prompt_pairs: Sequence[PromptPair], source: str) -> PreferenceDataset:
        """Return the preference dataset in `folder` with these pairs, drawn here: one seed a pair, both prompts.

        Pairs that are already there are kept, so an interrupted call goes on.
        """
        dataset = PreferenceDataset.create(folder, self.dataset_info(source))
        missing = [pair for pair in prompt_pairs if pair.id not in dataset.ids]
        for start in range(0, len(missing), IMAGES_PER_PASS):
            group = missing[start : start + IMAGES_PER_PASS]
            seeds = [pair.seed for pair in group]
            rejected = self.draw([pair.prompt for pair in group], seeds)
            chosen = self.draw([pair.safe_prompt for pair in group], seeds)
            for pair, safe_image, unsafe_image in zip(group, chosen, rejected, strict=True):
                dataset.add(pair, safe_image, unsafe_image)
        return dataset

    def dataset_info(self, source: str) -> DatasetInfo:
        """Return what a dataset of this model's pictures says of itself."""
        base = CheckpointId(name=self.checkpoint.name, sha256=self.checkpoint.sha256, family=self.checkpoint.family)
        return DatasetInfo(base, {"steps": STEPS, "cfg": CFG}, source, "")

    def _draw_group(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        side = self._size_px // 8
        noise = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        conditions = {"hidden_states": torch.cat([self._encode(prompts), self._encode([""] * len(prompts))])}
        latents = self._denoiser.sample(torch.stack(noise), conditions, STEPS, CFG, use_karras_sigmas=True)
        return self._vae.decode_images(latents)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        if len(self._hidden_states) > MAX_REMEMBERED:
            self._hidden_states.clear()
        if new := sorted(set(prompts) - set(self._hidden_states)):
            encoded = self._text_encoder.encode_prompts(new)["hidden_states"]
            self._hidden_states.update(zip(new, encoded, strict=True))
        return torch.stack([self._hidden_states[prompt] for prompt in prompts])


class ToySampler(Sampler):
    """Draws prompts with the toy model."""

    def __init__(self) -> None:
        super().__init__(ensure_toy_checkpoint(), SIZE_PX)

    def read(self, prompts: Sequence[str], seeds: Sequence[int], expert: Expert | None = None) -> list[Reading]:
        """Return what the oracle sees in the images that `draw` gives."""
        return [read_image(image) for image in self.draw(prompts, seeds, expert)]

    def build_dataset(self, folder: Path, pairs_per_category: int, categories: Sequence[str] = tuple(MARKS)):
        """Return the preference dataset in `folder`, drawn here: one seed a pair, unsafe prompt against safe prompt.

        Pairs that are already there are kept, so an interrupted call goes on.
        """
        return self.build_pairs(folder, expand_taxonomy(taxonomy(list(categories), pairs_per_category)), "toy world")
