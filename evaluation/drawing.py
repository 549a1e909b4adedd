"""Drawing an evaluation's arms with a checkpoint outside ComfyUI: the base model, with experts at their strengths."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError, SafetyExpertsError
from ..experts.expert import Expert
from ..experts.in_weights import weights_with
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Denoiser, StartImage, UNetDenoiser
from ..models.families import FAMILIES
from ..models.text_encoders import ClipTower
from ..preferences.dataset import ImageToImage
from ..preferences.prompt_pair import PromptPair
from .building import Both
from .guided import GuardTexts, PairGuide

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KEPT_PROMPTS = 512
_DEFAULT_PX = {"sd15": 512, "sd20": 768, "sdxl": 1024, "sd3": 1024, "flux": 1024}


@dataclass(frozen=True)
class Generation:
    """How every image is drawn.

    Args:
        steps, guidance: of DPM-Solver++ (2M) for UNets, of Euler's method for flow models.
        karras: noise levels spaced as Karras et al. do.
        negative: the negative prompt of all images.
        precision: of weights and computation: fp32, bf16 or fp16.
    """

    steps: int = 20
    guidance: float = 7.5
    width_px: int = 512
    height_px: int = 512
    karras: bool = False
    negative: str = ""
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise InputError(f"precision {self.precision!r}: choose from {', '.join(_PRECISIONS)}")
        for name, value in (("width", self.width_px), ("height", self.height_px)):
            if value < 16 or value % 8:
                raise InputError(f"{name} {value} must be a multiple of 8 pixels, at least 16")
        if self.steps < 1 or not 0 <= self.guidance <= 100:
            raise InputError("steps must be at least 1 and guidance between 0 and 100; correct them")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_size_px(family: str) -> int:
    """Return the side of the square images that a family is made for."""
    return _DEFAULT_PX.get(family, 512)


class CheckpointDrawer:
    """Draws with a checkpoint; its weights carry an arm's experts while that arm is drawn.

    Args:
        arms: arm id -> experts with their strengths; none for the base model.
        guards: arm id -> what it guards against while drawing.
        negatives: arm id -> its negative prompt, in place of that of all images.

    Attributes:
        num_rows: the rows of predictions that the model has made.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arms: Mapping[str, Sequence[tuple[Expert, float]]],
        generation: Generation,
        device: torch.device | str = "cpu",
        guards: Mapping[str, GuardTexts] | None = None,
        negatives: Mapping[str, str] | None = None,
    ):
        self._guards, self._negatives = guards or {}, negatives or {}
        self.checkpoint, self.arms, self.generation = checkpoint, arms, generation
        self.device = torch.device(device)
        dtype = _PRECISIONS[generation.precision]
        self._model = checkpoint.load_model(dtype, self.device)
        autocast = None if dtype is torch.float32 else dtype
        self.num_rows = 0
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._denoiser = checkpoint.make_denoiser(self._model, autocast)
        self._text_encoder = checkpoint.load_text_encoder(dtype, self.device)
        self._vae = checkpoint.load_vae(dtype, self.device)
        self._conditions: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._carried = contextlib.ExitStack()
        self._arm: str | None = None

    def _count(self, model: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.num_rows += len(next(v for v in (*arguments, *named.values()) if isinstance(v, Tensor) and v.ndim > 1))

    def close(self) -> None:
        """Give the model its own weights back."""
        self._carried.close()
        self._arm = None

    @torch.no_grad()  # not inference mode: an attack differentiates by the same weights and conditions
    def draw(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> list[Image.Image]:
        """Return one RGB image a prompt; image i starts from the noise of seed i, the same in every arm.

        Raises:
            InputError: an expert of the arm belongs to another model.
            SafetyExpertsError: memory ran out.
        """
        return self._decode(self.draw_latents(arm, prompts, seeds, guidance))

    @torch.no_grad()
    def draw_chosen_from_rejected(self, pairs: Sequence[PromptPair], how: ImageToImage) -> Both:
        """Return the rejected images, drawn from noise, and the chosen ones, drawn from them; of the base model.

        Raises:
            SafetyExpertsError: memory ran out.
        """
        seeds = [pair.seed or 0 for pair in pairs]
        unsafe, safe = [pair.prompt for pair in pairs], [pair.safe_prompt for pair in pairs]
        rejected = self.draw_latents("base", unsafe, seeds, None)
        start, negative = StartImage(rejected, how.denoise), unsafe if how.negates_unsafe else None
        chosen = self.draw_latents("base", safe, seeds, None, negative=negative, start=start)
        return self._decode(rejected), self._decode(chosen)

    @property
    def denoiser(self) -> Denoiser:
        """What an attack looks through.

        Raises:
            InputError: the model is no UNet.
        """
        if not isinstance(self._denoiser, UNetDenoiser):
            raise InputError(
                f"{self.checkpoint.name} is no UNet (SD 1.x, SD 2.x, SDXL), through which alone there is an attack; "
                "search through its text encoder"
            )
        return self._denoiser

    @property
    def clip_towers(self) -> Sequence[ClipTower]:
        return self._text_encoder.towers

    @contextlib.contextmanager
    def carrying(self, arm: str) -> Iterator[None]:
        """Inside, the model's weights are that arm's, for whoever computes with `denoiser` and `clip_towers`."""
        self._carry(arm)
        yield

    @torch.no_grad()
    def draw_latents(
        self,
        arm: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float | None,
        *,
        negative: Sequence[str] | None = None,
        start: StartImage | None = None,
    ) -> Tensor:
        """Return the latents [n, c, h, w] of what `draw` draws.

        Args:
            negative: a negative prompt for each; None: that of all images.
            start: begin with these images, not with noise alone.
        """
        self._carry(arm)
        generation = self.generation
        height, width = generation.height_px // 8, generation.width_px // 8
        channels = next(family.latent_channels for family in FAMILIES if family.name == self.checkpoint.family)
        noise = torch.stack(
            [torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(self.device)
        conditions = self.encode(
            arm, [*prompts, *(negative or [self._negatives.get(arm, generation.negative)] * len(prompts))]
        )
        own = generation.guidance if guidance is None else guidance
        options = {"use_karras_sigmas": generation.karras} if isinstance(self._denoiser, UNetDenoiser) else {}
        guide = None
        if guard := self._guards.get(arm):
            guide = PairGuide(guard, lambda text: self.encode(arm, [text]), generation.steps)
        with _enough_memory(len(prompts)):
            return self._denoiser.sample(noise, conditions, generation.steps, own, start=start, guide=guide, **options)

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        with _enough_memory(len(latents)):
            return self._vae.decode_images(latents)

    def _carry(self, arm: str) -> None:
        if arm == self._arm:
            return
        self.close()
        towers = [tower.model for tower in getattr(self._text_encoder, "towers", ())]
        self._carried.enter_context(weights_with(self._model, towers, self.arms[arm]))
        self._arm = arm

    def encode(self, arm: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditions of prompts, each encoded once for all arms that leave the text encoder alone."""
        owner = arm if _changes_text(self.arms[arm]) else ""
        if len(self._conditions) > _KEPT_PROMPTS:
            self._conditions.clear()
        # One by one: a prompt's numbers then do not depend on which others are encoded with it.
        for prompt in dict.fromkeys(prompts):
            if (owner, prompt) not in self._conditions:
                encoded = self._text_encoder.encode_prompts([prompt])
                self._conditions[owner, prompt] = {name: value[0] for name, value in encoded.items()}
        rows = [self._conditions[owner, prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}


@contextlib.contextmanager
def _enough_memory(num_images: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise SafetyExpertsError(
            f"out of memory drawing {num_images} images at once; use a smaller --batch-size"
        ) from None


def _changes_text(experts: Sequence[tuple[Expert, float]]) -> bool:
    return any(name.startswith("lora_te") for expert, _ in experts for name in expert.layers)


@contextlib.contextmanager
def drawer_of(
    checkpoint: Checkpoint,
    arms: Mapping[str, Sequence[tuple[Expert, float]]],
    generation: Generation,
    device: torch.device | str,
    guards: Mapping[str, GuardTexts] | None = None,
    negatives: Mapping[str, str] | None = None,
) -> Iterator[CheckpointDrawer]:
    """Yield a drawer, and free what it carries at the end."""
    drawer = CheckpointDrawer(checkpoint, arms, generation, device, guards, negatives)
    try:
        yield drawer
    finally:
        drawer.close()
