"""Cards of experts: the command's model card, the page's routes, and numbers of the very file only."""

import asyncio
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from aiohttp import web
from PIL import Image
from rendered_arms import HALF, RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.commands import run as run_command
from safety_experts.errors import InputError
from safety_experts.evaluation.card_numbers import first_numbers, numbers_of
from safety_experts.evaluation.evaluate import run as run_evaluation
from safety_experts.evaluation.plan import BASE_ARM, NULL_ARM
from safety_experts.experts.card import CardNumber, card_markdown
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import save_expert
from safety_experts.experts.info import ExpertInfo, Trained
from safety_experts.files import path_inside
from safety_experts.training.recipe import Recipe
from safety_experts.training.samples import Samples
from safety_experts.training.watching.card_routes import PREFIX, add_card_routes
from safety_experts.training.watching.cards import make_card
from safety_experts.training.watching.recorder import RunRecorder
from test_watching import SECRET, send

LAYER = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
NUMBER = CardNumber("violence, any", (0.9, 0.8, 0.95), (0.1, 0.05, 0.2), 40, "bench, 2026-11-25")


def write_expert(path: Path, **changes) -> Path:
    trained = Trained(
        recipe={"name": "toy", "steps": 40, "objective": "sigmoid"}, step=12, finished=False, num_pairs=96, seed=3,
        metrics={"eval/loss": 0.4, "unheard of": 1.0},
    )  # fmt: skip
    base = CheckpointId(name="toy.safetensors", sha256="ab" * 32, family="sd15")
    info = ExpertInfo(categories=("violence",), base_checkpoint=base, origin=trained)
    layer = LoraLayer(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_expert(Expert({LAYER: layer}, replace_info(info, changes), path.stem), path)
    return path


def replace_info(info: ExpertInfo, changes: dict) -> ExpertInfo:
    return info.model_copy(update=changes)


def test_the_command_writes_a_card_that_hubs_read(tmp_path, capsys):
    path = write_expert(tmp_path / "mine.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.preview.png")
    out = tmp_path / "README.md"
    assert run_command(["card", str(path), "--out", str(out), "--license", "openrail++"]) == 0
    _, front, text = out.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "openrail++",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "safety", "dpo", "safety-violence"],
    }
    assert "(mine.preview.png)" in text and "Unfinished" in text and "No evaluation of this file" in text
    assert "step" not in capsys.readouterr().out
    assert run_command(["card", str(path), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (
        card["facts"]["Step"] == "12 of 40, unfinished: its training was stopped" and card["facts"]["Recipe"] == "toy"
    )
    assert card["metrics"] == {"held-out loss": 0.4} and card["strengths"] == ["violence"]


def test_numbers_stand_with_their_intervals(tmp_path):
    card = replace(make_card(write_expert(tmp_path / "mine.safetensors")), numbers=[NUMBER])
    assert "| violence, any | 90.0 % (80.0 to 95.0) | 10.0 % (5.0 to 20.0) | 40 |" in card_markdown(card)


def test_what_a_stranger_wrote_into_the_file_is_text_and_no_markup(tmp_path):
    path = write_expert(tmp_path / "mine.safetensors", categories=("x](http://evil) | --- license: mit", "<b>"))
    text = card_markdown(make_card(path))
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert front["license"] == "other"
    body = text.split("---\n", 2)[2]
    assert (
        "](http" not in body.replace("\\](", "")
        and "\nlicense: mit" not in body
        and "<b>" not in body.replace("\\<", "")
    )


def test_an_evaluation_of_another_file_is_refused(tmp_path, capsys):
    path = write_expert(tmp_path / "mine.safetensors")
    (tmp_path / "evaluated").mkdir()
    assert run_command(["card", str(path), "--evaluation", str(tmp_path / "evaluated")]) == 2
    assert first_numbers([tmp_path / "evaluated", tmp_path / "absent"], "0" * 64) == []
    assert run_command(["card", str(tmp_path / "absent.safetensors")]) == 2


def test_numbers_are_those_of_an_evaluation_of_this_very_file_alone(tmp_path):
    made_of = ({"name": "mine", "sha256": "cd" * 32, "strength": 1.0},)
    arms = (BASE_ARM, replace(HALF, made_of=made_of), replace(NULL_ARM))
    run_evaluation(tmp_path / "bench", toy_plan(toy_suite(4), arms), RenderedArms(), [toy_oracle()])
    found = numbers_of(tmp_path / "bench", "cd" * 32)
    assert numbers_of(tmp_path / "bench", "ab" * 32) == []
    before, after = next((n.before, n.after) for n in found if n.label.startswith("violence"))
    assert before[0] == 1.0 and after[0] == 0.5 and after[1] < 0.5 < after[2]
    assert {n.source[:6] for n in found} == {"bench,"}


class Shelf:
    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("*.safetensors"))

    def path(self, name: str) -> Path:
        path = path_inside(self.root, name)
        if not path.is_file():
            raise InputError("there is no such expert")
        return path


@pytest.fixture
def root(tmp_path):
    path = write_expert(tmp_path / "loras" / "mine.safetensors")
    recorder = RunRecorder(path, Recipe(steps=40))
    for step in (0, 12):
        recorder.add_samples(Samples(step, {"unsafe": Image.new("RGB", (8, 8)), "safe": Image.new("RGB", (8, 8))}))
    recorder.end("stopped")
    write_expert(tmp_path / "secret.safetensors")
    (tmp_path / "secret.preview.png").write_bytes(SECRET)
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"no safetensors")
    return tmp_path / "loras"


@pytest.fixture
def port(root):
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        routes = web.RouteTableDef()
        add_card_routes(routes, Shelf(root), lambda sha256: [NUMBER])
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield ports[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def get(port: int, path: str, **headers: str):
    return send(port, "GET", path, prefix=PREFIX, **headers)


def test_the_page_lists_the_experts_and_shows_a_card(port, root):
    (expert,) = json.loads(get(port, "list")[2])["experts"]  # the broken file is no expert, and hides none
    assert expert == {
        "name": "mine.safetensors", "has_preview": False, "categories": ["violence"], "family": "sd15",
        "state": "unfinished",
    }  # fmt: skip
    card = json.loads(get(port, "card?name=mine.safetensors")[2])
    assert card["pictures"] == [[0, 2], [12, 2]] and card["numbers"][0]["after"] == [0.1, 0.05, 0.2]
    assert card["facts"]["Trained"].endswith("(UTC)")
    status, headers, body = get(port, "picture?name=mine.safetensors&step=12&number=0")
    assert status == 200 and headers["Content-Type"] == "image/png" and body.startswith(b"\x89PNG")
    assert b"page/page.mjs" in get(port, "")[2] and b"drawCard" in get(port, "page/card.mjs")[2]


@pytest.mark.parametrize(
    "path",
    [
        "card?name=..%2Fsecret.safetensors",
        "card?name=%2Fetc%2Fpasswd",
        "card?name=broken.safetensors",
        "card?name=absent.safetensors",
        "card?name=mine",
        "card",
        "preview?name=..%2Fsecret.safetensors",
        "preview?name=mine.safetensors",
        "preview?name=linked.safetensors",
        "picture?name=mine.safetensors&step=..%2F0&number=0",
        "picture?name=mine.safetensors&step=7&number=0",
        "page/..%2Fcards.js",
    ],
)
def test_nothing_outside_comes_out(port, root, path):
    os.link(root / "mine.safetensors", root / "linked.safetensors")
    (root / "linked.preview.png").symlink_to(root.parent / "secret.preview.png")
    status, _, body = get(port, path)
    assert status in (400, 404) and SECRET not in body


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_another_site_is_refused(port, headers):
    assert get(port, "list", **headers)[0] == 403
