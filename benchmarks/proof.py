"""The proof of one model from end to end, as a user has it: the toy model, an expert at several strengths, and a merge.

`evaluate` draws and judges 48 prompts with each, and the base model with other seeds; then half as many through a real
ComfyUI (the Evaluate Safety node). benchmarks/recount.py counts the pictures again, a Chromium opens both reports:
pictures of unsafe prompts are blurred, a slider is moved by arrow keys, nothing is asked from a network.

Parts are kept in --work, so a stopped run goes on.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.experiments import sampler, toy_recipe, trained
from safety_experts.demo.toy_checkpoint import CFG, SAMPLER_NAME, SCHEDULER, STEPS
from safety_experts.evaluation.machine import describe_machine
from safety_experts.experts.expert_file import save_expert
from safety_experts.experts.merging import merge_experts
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import SIZE_PX, taxonomy

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "proof.json"
CATEGORIES, FIRST_SEED = ("violence", "hate"), 3_000_000
PAIRS = {"command": 12, "graph": 6}  # of each category
STRENGTHS = {"command": "0.25,0.35,0.42,0.46,0.5,1", "graph": "0.25,0.5,1"}
PRIMARY = {"command": "violence@0.46", "graph": "violence@0.5"}


def main() -> None:
    """Draw, recount, look, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for experts and pictures (default: a temporary one)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="also take pictures of the report")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = prove(arguments.work or Path(temporary), arguments.screenshots)
    result["machine"] = describe_machine("diffusers", "playwright")
    print(json.dumps(result, indent=1))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def prove(work: Path, screenshots: Path | None) -> dict:
    experts = make_experts(work)
    comfyui = find_comfyui()
    words = ["evaluate", "--model", sampler().checkpoint.path, "--judge", "toy-oracle"]
    words += ["--set", "toy-oracle.rule=own-mark"]
    words += ["--steps", STEPS, "--guidance", CFG, "--width", SIZE_PX, "--height", SIZE_PX, "--batch-size", 16]
    outside = ["--karras", "--tokenizer", comfyui / "comfy" / "sd1_tokenizer", "--metric", "toy-adherence", "--share"]
    inside = ["--comfyui", comfyui, "--sampler", SAMPLER_NAME, "--scheduler", SCHEDULER]
    found = {}
    for name, more in (("command", outside), ("graph", inside)):
        folder, prompts = work / name, write_prompts(work / f"{name}.csv", PAIRS[name])
        arms = ["--expert", f"{experts[0]}@{STRENGTHS[name]}", "--expert", experts[1], "--primary", PRIMARY[name]]
        evaluate([*words, *more, *arms, "--prompts", prompts, "--device", "cpu"], folder)
        found[name] = recounted(folder) | look(folder, screenshots if name == "command" else None)
    return {
        "claim": "the numbers of a report are those of its pictures, outside and inside ComfyUI",
        "setting": f"prompt pairs of each of {' and '.join(CATEGORIES)}: {PAIRS}; experts of 48 pairs, recipe "
        f"toy, seed 0; merge: linear; {STEPS} steps, guidance {CFG}",
        "rates_between_20_and_80_percent": sorted(
            f"{arm}, {group}: {rate} %"
            for arm, row in found["command"]["unsafe_percent"].items()
            for group, rate in row.items()
            if 20 <= rate <= 80
        ),
        **found,
    }


def make_experts(work: Path) -> tuple[Path, Path]:
    """Return the files of the expert and of the merge."""
    sampler().build_dataset(work / "pairs", 48, CATEGORIES)
    experts = [trained(work, name, toy_recipe(0), name) for name in CATEGORIES]
    save_expert(merge_experts(experts, "linear"), work / "merge.safetensors")
    return work / f"{CATEGORIES[0]}.safetensors", work / "merge.safetensors"


def write_prompts(path: Path, pairs_per_category: int) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "safe_prompt", "category", "seed"])
        for pair in expand_taxonomy(taxonomy(CATEGORIES, pairs_per_category), first_seed=FIRST_SEED):
            writer.writerow([pair.prompt, pair.safe_prompt, *pair.categories, pair.seed])
    return path


def evaluate(words: list, folder: Path) -> None:
    """Run the command line as a user does."""
    command = [sys.executable, ROOT / "cli.py", *words, "--out", folder]
    subprocess.run([str(word) for word in command], check=True)


def recounted(folder: Path) -> dict:
    script = ROOT / "benchmarks" / "recount.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def look(folder: Path, screenshots: Path | None) -> dict:
    """Open the report in a Chromium: what is blurred, what a key moves, what is asked for."""
    from playwright.sync_api import sync_playwright

    def filter_of(locator) -> str:
        return locator.evaluate("node => getComputedStyle(node).filter")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 1500}, reduced_motion="reduce")
        errors: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "report.html").as_uri())
        blurred = page.locator("figure.blurred img")
        filters = [filter_of(blurred.nth(number)) for number in range(blurred.count())]
        slider, over = page.locator(".pairs input[type=range]").first, page.locator(".pairs img.over").first
        first_cut = over.evaluate("node => getComputedStyle(node).clipPath")
        slider.focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        value, cut = slider.input_value(), over.evaluate("node => getComputedStyle(node).clipPath")
        page.locator(".pairs button.reveal").first.focus()
        page.keyboard.press("Enter")
        revealed = filter_of(page.locator(".pairs figure.blurred img").first)
        if screenshots:
            take_pictures(page, screenshots)
        browser.close()
    network = [url for url in asked if url.startswith(("http:", "https:"))]
    if errors or network or value != "70" or cut == first_cut or revealed != "none":
        raise SystemExit(f"{folder}: errors {errors}, network {network}, slider at {value}, {revealed} after Enter")
    if not filters or not all(text.startswith("blur") for text in filters):
        raise SystemExit(f"{folder}: a picture of an unsafe prompt is not blurred")
    return {"blurred_pictures": len(filters), "slider_after_20_keys": int(value), "requests_to_a_network": len(network)}


def take_pictures(page, folder: Path) -> None:
    """Save the page's first screens, with everything blurred, and its pictures with a slider moved and shown."""
    page.reload()
    page.screenshot(path=folder / "report.png")
    page.set_viewport_size({"width": 1100, "height": 800})
    slider = page.locator(".pairs input[type=range]").first
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.locator("#show-all").click()
    slider.focus()
    page.locator("#pictures").scroll_into_view_if_needed()
    page.evaluate("document.getElementById('pictures').scrollIntoView()")
    page.screenshot(path=folder / "report_pictures.png")


if __name__ == "__main__":
    main()
