"""Generate Preference Pairs against the stock graph of two KSamplers a pair, on a real server: time, and the images.

    python benchmarks/generate_pairs.py [--pairs 64] [--rounds 3] [--batch-size 4]

The stock graph draws and saves both images of one pair; it is queued once a pair, all at once. The node draws them all
in one graph, into a dataset, at its default batch size. Rounds alternate, each with seeds of its own so that ComfyUI
caches no picture. CPU seconds are the server's, which a busy machine changes less than the wall time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.headless.graphs import Graph, Links, ModelFiles, add_loaders
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import MARKS, taxonomy

RESULT = Path(__file__).resolve().parent / "results" / "generate_pairs.json"
SIZE_PX, STEPS = 64, 12
SAMPLING = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    clocks: dict[str, list[list[float]]] = {"node": [], "stock": []}
    differences: list[int] = []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder) / "server", cpu=True) as server:
        for number in range(arguments.rounds + 1):  # the first, of two pairs, warms up
            pairs = draw_pairs(arguments.pairs if number else 2, number)
            pictures: dict[str, list[np.ndarray]] = {}
            for arm in ("node", "stock") if number % 2 else ("stock", "node"):
                before = read_clocks(server)
                read = by_node(server, pairs, arguments.batch_size) if arm == "node" else by_stock(server, pairs)
                spent = [after - start for after, start in zip(read_clocks(server), before, strict=True)]
                pictures[arm] = read()
                if number:
                    clocks[arm].append(spent)
                    print(arm, [round(value, 2) for value in spent], flush=True)
            both = zip(pictures["node"], pictures["stock"], strict=True)
            differences += [int(np.abs(ours - theirs).max()) for ours, theirs in both]
    medians = {arm: [statistics.median(column) for column in zip(*spent, strict=True)] for arm, spent in clocks.items()}
    wall, cpu = (medians["node"][column] / medians["stock"][column] for column in (0, 1))
    result = {
        "claim": "64 toy pairs by the node in at most 0.8 of the time of the stock two-KSampler graph, the same images",
        "pairs": arguments.pairs,
        "rounds": arguments.rounds,
        "setting": f"toy checkpoint, {SIZE_PX} px, {STEPS} euler steps, cfg 3, batches of {arguments.batch_size}; the "
        "stock graph saves PNG files, the node a dataset",
        "wall_times_of_stock": round(wall, 3),
        "cpu_times_of_stock": round(cpu, 3),
        "median_seconds": {arm: {"wall": round(s[0], 2), "cpu": round(s[1], 2)} for arm, s in medians.items()},
        "images": len(differences),
        "images_equal": differences.count(0),
        "largest_difference_of_255": max(differences),
        **describe_machine("pillow"),
    }
    print(json.dumps(result, indent=2))
    if max(differences) > 1:
        raise SystemExit("the images differ")
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def draw_pairs(number: int, round_number: int) -> Sequence[PromptPair]:
    """Return prompts of every category, with seeds that no other round has."""
    each = -(-number // len(MARKS))
    return expand_taxonomy(taxonomy(list(MARKS), each), 1000 * round_number)[:number]


def read_clocks(server: ComfyServer) -> tuple[float, float]:
    """Return the time, and the server's CPU seconds so far."""
    fields = Path(f"/proc/{server.process_id}/stat").read_text().rpartition(")")[2].split()
    return time.perf_counter(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loaded(server: ComfyServer) -> tuple[Graph, Links]:
    """Return a graph that loads the toy checkpoint."""
    graph = Graph()
    return graph, add_loaders(graph, server, ModelFiles(ensure_toy_checkpoint()))


def by_node(server: ComfyServer, pairs: Sequence[PromptPair], batch_size: int):
    """Draw with the node; return what reads the pictures, rejected before chosen."""
    graph, links = loaded(server)
    text = "\n".join(f"{pair.prompt} | {pair.safe_prompt}" for pair in pairs)
    source = {"source": "text", "source.text": text, "source.category": "violence"}
    prompts = graph.add("SafetyExpertsPromptPairs", **source, source__first_seed=pairs[0].seed)
    name = f"pairs_{pairs[0].seed}_{len(pairs)}"
    graph.add(
        "SafetyExpertsGeneratePairs",
        model=links.model,
        clip=links.clip,
        vae=links.vae,
        prompt_pairs=(prompts, 0),
        negative_prompt="",
        width=SIZE_PX,
        height=SIZE_PX,
        batch_size=batch_size,
        dataset_name=name,
        checkpoint="(the model says)",
        preview="off",
        **SAMPLING,
    )
    server.run(graph)

    def read() -> list[np.ndarray]:
        dataset = PreferenceDataset.open(server.base_directory / "datasets" / name)
        paths = [path for pair in dataset.pairs for path in reversed(dataset.image_paths(pair))]
        return [np.asarray(Image.open(path)).astype(int) for path in paths]

    return read


def by_stock(server: ComfyServer, pairs: Sequence[PromptPair]):
    """Draw with two KSamplers a pair; return what reads the pictures, rejected before chosen."""
    queued = []
    for pair in pairs:
        graph, links = loaded(server)
        saved = [_ksampler(graph, links, text, pair.seed) for text in (pair.prompt, pair.safe_prompt)]
        queued.append((server.queue(graph), saved))
    server.wait(queued[-1][0])

    def read() -> list[np.ndarray]:
        found = []
        for prompt_id, saved in queued:
            outputs = server.history(prompt_id)["outputs"]
            found += [Image.open(BytesIO(server.view(outputs[node]["images"][0]))) for node in saved]
        return [np.asarray(picture).astype(int) for picture in found]

    return read


def _ksampler(graph: Graph, links: Links, prompt: str, seed: int) -> str:
    sampled = graph.add(
        "KSampler",
        model=links.model,
        positive=(graph.add("CLIPTextEncode", clip=links.clip, text=prompt), 0),
        negative=(graph.add("CLIPTextEncode", clip=links.clip, text=""), 0),
        latent_image=(graph.add("EmptyLatentImage", width=SIZE_PX, height=SIZE_PX, batch_size=1), 0),
        seed=seed,
        denoise=1.0,
        **SAMPLING,
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=links.vae)
    return graph.add("SaveImage", images=(decoded, 0), filename_prefix="stock")


if __name__ == "__main__":
    main()
