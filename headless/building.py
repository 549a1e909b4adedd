"""Drawing a preference dataset with a model that ComfyUI loads, by its Generate Preference Pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..demo.comfyui import ComfyServer
from ..evaluation.building import BuildingStoppedError
from ..preferences.dataset import ImageToImage, PreferenceDataset
from ..preferences.pairs import write_prompt_pairs
from ..preferences.prompt_pair import PromptPair
from .graphs import Graph, ModelFiles, add_loaders
from .session import Comfy, run_graph, tidied, tidy, work_folder

_PROMPTS = "pairs.jsonl"


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: the stock KSampler's settings."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    width_px: int
    height_px: int
    batch_size: int

    def inputs(self) -> dict[str, object]:
        """Return the inputs of a node that draws."""
        return {
            "steps": self.steps,
            "cfg": self.cfg,
            "sampler_name": self.sampler_name,
            "scheduler": self.scheduler,
            "width": self.width_px,
            "height": self.height_px,
            "batch_size": self.batch_size,
        }


def add_prompt_pairs(graph: Graph, server: ComfyServer, pairs: Sequence[PromptPair]) -> str:
    """Hand prompt pairs to the server; return the node that reads them."""
    write_prompt_pairs(server.base_directory / "input" / _PROMPTS, pairs)
    return graph.add("SafetyExpertsPromptPairs", source="file", source__file=f"input/{_PROMPTS}")


def build_in_comfyui(
    comfy: Comfy,
    files: ModelFiles,
    pairs: Sequence[PromptPair],
    out: Path,
    sampling: Sampling,
    negative: str = "",
    image_to_image: ImageToImage | None = None,
) -> PreferenceDataset:
    """Draw what the dataset in `out` has not yet.

    Args:
        image_to_image: how the chosen images are drawn from the rejected ones; None draws both from noise.

    Raises:
        InputError: the node refuses the model, the prompts or the folder, in its own words.
        BuildingStoppedError: it was stopped; what was drawn is kept.
        SafetyExpertsError: the work failed; what was drawn is kept.
    """
    work = work_folder(out)
    tidy(work, keep_log=False)
    how = image_to_image
    chosen = {"denoise": how.denoise, "negate_unsafe": how.negates_unsafe} if how else {}

    def build(server: ComfyServer) -> tuple[Graph, str]:
        graph = Graph()
        links = add_loaders(graph, server, files)
        return graph, graph.add(
            "SafetyExpertsGeneratePairs",
            model=links.model,
            clip=links.clip,
            vae=links.vae,
            prompt_pairs=(add_prompt_pairs(graph, server, pairs), 0),
            negative_prompt=negative,
            dataset_name=out.name,
            checkpoint="(the model says)",
            preview="off",
            **sampling.inputs(),
            **chosen,
        )

    with tidied(work):
        finished = run_graph(comfy, work, build, {"dataset": out.absolute()})
    if not finished:
        raise BuildingStoppedError(f"stopped; what was drawn is kept in {out}, the same command goes on")
    return PreferenceDataset.open(out)
