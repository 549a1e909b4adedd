"""What a training leaves for the run page, what it can be asked while it runs, and what the page's routes refuse."""

import asyncio
import http.client
import json
import threading
from pathlib import Path
from urllib.parse import urlencode

import pytest
from aiohttp import web
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.experts.expert_file import load_expert
from safety_experts.files import path_inside
from safety_experts.training.events import SAMPLE, SAVE, StepRecord, TrainingEvents
from safety_experts.training.recipe import Recipe
from safety_experts.training.samples import Samples
from safety_experts.training.watching.recorder import RunRecorder, recorded
from safety_experts.training.watching.routes import PREFIX, add_run_routes
from safety_experts.training.watching.run_files import (
    describe_run,
    metrics_path,
    read_metrics,
    read_state,
    run_folder,
    sample_path,
    sample_steps,
)
from small_training import SmallTraining

SECRET = b"the secret outside"


@pytest.fixture
def expert(tmp_path):
    return tmp_path / "loras" / "mine_00001_.safetensors"


def record(expert: Path, steps: int = 3, **options) -> RunRecorder:
    """A training of made-up numbers that drew samples before it and at its last step."""
    recorder = RunRecorder(expert, Recipe(name="toy", steps=steps), **options)
    pictures = {"unsafe words": Image.new("RGB", (8, 8), "red"), "safe words": Image.new("RGB", (8, 8), "green")}
    recorder.add_samples(Samples(0, pictures))
    for step in range(1, steps + 1):
        recorder.add_step(StepRecord("train", step, steps, {"loss": 1 / step, "drift": float("nan")}))
    recorder.add_samples(Samples(steps, pictures))
    return recorder


def test_what_was_recorded_is_read_again_from_any_step_on(expert):
    record(expert).end("finished")
    whole, rest = describe_run(expert), describe_run(expert, 2)
    assert whole["metrics"] == [
        {"loss": 1.0, "drift": None},
        {"loss": 0.5, "drift": None},
        {"loss": 0.333333, "drift": None},
    ]
    assert rest["metrics"] == whole["metrics"][2:]
    assert whole["samples"] == [(0, 2), (3, 2)] and whole["prompts"] == ["unsafe words", "safe words"]
    assert (whole["state"], whole["step"], whole["num_steps"]) == ("finished", 3, 3)


def test_a_torn_or_damaged_line_ends_the_curve_instead_of_shifting_it(expert):
    record(expert)
    lines = metrics_path(expert).read_text().splitlines(keepends=True)
    metrics_path(expert).write_text("".join(lines) + '{"loss": 0.')
    assert len(read_metrics(expert)) == 3
    metrics_path(expert).write_text(lines[0] + "[]\n" + lines[2])
    assert len(read_metrics(expert)) == 1


def test_a_failed_training_leaves_its_record_only_beside_something(expert):
    with pytest.raises(InputError), recorded(record(expert)):
        raise InputError("broken")
    assert not run_folder(expert).exists() and not metrics_path(expert).exists()
    with pytest.raises(InputError), recorded(record(expert)):
        expert.with_suffix(".resume").touch()
        raise InputError("broken")
    assert (read_state(expert).state, read_state(expert).message) == ("failed", "broken")


def test_a_resumed_training_takes_over_the_samples(expert):
    record(expert)
    again = RunRecorder(expert.with_name("mine_00002_.safetensors"), Recipe(steps=9), continues=expert)
    again.resume([{"loss": 1.0}])
    assert sample_steps(again.expert) == [(0, 2), (3, 2)] and read_metrics(again.expert) == [{"loss": 1.0}]


def test_a_full_disk_ends_the_record_and_not_the_training(expert, limit_files, caplog):
    recorder = record(expert)
    limit_files(10)
    for step in range(4, 8):
        recorder.add_step(StepRecord("train", step, 7, {"loss": 1.0}))
    assert len([line for line in caplog.messages if "the training goes on" in line]) == 1


def test_it_does_only_what_it_can(expert):
    recorder = record(expert, takes=["stop"])
    with pytest.raises(InputError, match="cannot be asked to sample"):
        recorder.ask("sample")
    with pytest.raises(InputError):
        recorder.ask("explode")
    recorder.ask("stop")
    assert recorder.is_stopped() and recorder.take_requests() == set() and recorder.is_stopped()


@pytest.mark.slow
def test_what_is_asked_while_training_changes_nothing_of_it(tmp_path):
    small = SmallTraining.create(tmp_path)
    straight = small.train(tmp_path / "straight.safetensors", "steps=4")
    asked, drawn, saved = iter([(), (SAMPLE, SAVE)]), [], []
    events = TrainingEvents(on_samples=drawn.append, on_saved=saved.append, take_requests=lambda: next(asked, ()))
    disturbed = small.train(tmp_path / "disturbed_.safetensors", "steps=4", events=events)
    assert disturbed.expert.tensors_sha256() == straight.expert.tensors_sha256()
    assert [samples.step for samples in drawn] == [2]
    (path,) = saved
    assert path.name == "disturbed_step_2.safetensors"
    on_the_way = load_expert(path)
    assert (on_the_way.info.trained.step, on_the_way.info.trained.finished) == (2, False)
    steps: list[int] = []
    halfway = TrainingEvents(
        on_step=lambda record: record.stage == "train" and steps.append(record.step), should_stop=lambda: 2 in steps
    )
    stopped = small.train(tmp_path / "half.safetensors", "steps=4", events=halfway)
    assert on_the_way.tensors_sha256() == stopped.expert.tensors_sha256()


class Shelf:
    """Trainings below one folder, as in ComfyUI."""

    def __init__(self, root: Path):
        self.root, self.running = root, {}

    def names(self) -> list[str]:
        return [path.parent.stem for path in self.root.glob("*.run/run.json")]

    def expert(self, name: str) -> Path:
        return path_inside(self.root, f"{name}.safetensors")

    def active(self, name: str):
        return self.running.get(name)


@pytest.fixture
def shelf(expert):
    record(expert)
    (expert.parent.parent / "secret.run" / "samples").mkdir(parents=True)
    (expert.parent.parent / "secret.run" / "samples" / "000000-0.png").write_bytes(SECRET)
    return Shelf(expert.parent)


@pytest.fixture
def port(shelf):
    """The routes in a server of their own thread."""
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> None:
        routes = web.RouteTableDef()
        add_run_routes(routes, shelf)
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


def send(port: int, method: str, path: str, body: bytes = b"", prefix: str = PREFIX, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    given = {"Host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, f"{prefix}/{path}", body, given)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def ask(port: int, body: object, **headers: str):
    return send(port, "POST", "ask", json.dumps(body).encode(), **({"Content_Type": "application/json"} | headers))


def test_the_routes_give_the_page_the_state_and_the_samples(port, shelf, expert):
    assert b"page/page.mjs" in send(port, "GET", "")[2]
    assert send(port, "GET", "page/uplot.mjs")[1]["Content-Type"].startswith("text/javascript")
    (run,) = json.loads(send(port, "GET", "runs")[2])["runs"]
    assert (run["name"], run["is_active"]) == ("mine_00001_", False)
    state = json.loads(send(port, "GET", "state?run=mine_00001_&since=1")[2])
    assert len(state["metrics"]) == 2 and not state["takes"]
    status, headers, body = send(port, "GET", "sample?run=mine_00001_&step=3&number=1")
    assert status == 200 and headers["Content-Type"] == "image/png" and headers["Cache-Control"] == "no-store"
    assert body == sample_path(expert, 3, 1).read_bytes()


def test_a_request_reaches_the_training_that_runs_and_no_other(port, shelf, expert):
    assert ask(port, {"run": "mine_00001_", "request": "stop"})[0] == 409
    shelf.running["mine_00001_"] = recorder = record(expert)
    status, _, body = ask(port, {"run": "mine_00001_", "request": "sample"})
    assert (status, json.loads(body)) == (200, {"waiting": ["sample"]}) and recorder.take_requests() == {"sample"}
    assert ask(port, {"run": "mine_00001_", "request": "explode"})[0] == 400
    assert not recorder.is_stopped()


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (403, {"run": "mine_00001_", "request": "stop"}, {"Origin": "http://evil.example"}),
        (403, {"run": "mine_00001_", "request": "stop"}, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"run": "mine_00001_", "request": "stop"}, {"Host": "evil.example"}),
        (415, {"run": "mine_00001_", "request": "stop"}, {"Content_Type": "text/plain"}),
        (413, {"run": "x" * 5000, "request": "stop"}, {}),
        (400, {"run": "mine_00001_", "request": "stop", "more": 1}, {}),
        (400, ["mine_00001_", "stop"], {}),
        (400, {"run": 1, "request": "stop"}, {}),
    ],
)
def test_a_hostile_request_stops_nothing(port, shelf, expert, status, body, headers):
    shelf.running["mine_00001_"] = recorder = record(expert)
    assert ask(port, body, **headers)[0] == status
    assert not recorder.is_stopped()


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("sample", {"run": "../secret", "step": "0", "number": "0"}),
        ("sample", {"run": "/etc/passwd", "step": "0", "number": "0"}),
        ("sample", {"run": "mine_00001_", "step": "../../../secret.run/samples/000000", "number": "0"}),
        ("sample", {"run": "mine_00001_", "step": "-1", "number": "0"}),
        ("sample", {"run": "mine_00001_", "step": "9", "number": "0"}),
        ("sample", {"run": "mine_00001_", "step": "٣", "number": "0"}),
        ("sample", {"run": "linked", "step": "0", "number": "0"}),
        ("sample", {"run": "x" * 1000, "step": "0", "number": "0"}),
        ("sample", {"run": "nul\0", "step": "0", "number": "0"}),
        ("state", {"run": "../secret", "since": "0"}),
        ("state", {"run": "mine_00001_", "since": "1e9"}),
        ("state", {"run": "mine_00001_"}),
        ("page/..%2frun_files.py", {}),
        ("page/../review/main.mjs", {}),
    ],
)
def test_nothing_outside_comes_out(port, shelf, path, query):
    (shelf.root / "linked.run").symlink_to(shelf.root.parent / "secret.run", target_is_directory=True)
    status, _, body = send(port, "GET", f"{path}?{urlencode(query)}")
    assert status in (400, 404) and SECRET not in body


def test_a_picture_that_is_none_and_a_damaged_record_are_refused_and_hide_no_other(port, shelf, expert):
    sample_path(expert, 3, 0).write_bytes(SECRET)
    status, _, body = send(port, "GET", "sample?run=mine_00001_&step=3&number=0")
    assert status == 400 and SECRET not in body
    record(expert.with_name("other_00001_.safetensors"))
    (run_folder(expert) / "run.json").write_text('{"format_version": 1, "state": "owned"}')
    assert [run["name"] for run in json.loads(send(port, "GET", "runs")[2])["runs"]] == ["other_00001_"]
