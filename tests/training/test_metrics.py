"""Metrics on disk: every step once, whatever happened in between."""

import csv
import json
import sys

import pytest
from safety_experts.errors import InputError
from safety_experts.training.events import TrainingEvents
from safety_experts.training.metrics import MetricsFiles, TensorBoard, WeightsAndBiases
from small_training import SmallTraining

TRL_NAMES = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


def read_csv(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_both_files_hold_every_step_and_every_name(tmp_path):
    files = MetricsFiles(tmp_path)
    files.start([])
    records = [{"loss": 0.1}, {"loss": 1 / 3, "eval/loss": 0.25}, {"loss": 2e-9}]
    for step, record in enumerate(records, start=1):
        files.add(step, record)
    assert read_lines(tmp_path) == [{"step": step, **record} for step, record in enumerate(records, start=1)]
    rows = read_csv(tmp_path)
    assert [row["eval/loss"] for row in rows] == ["", "0.25", ""]
    assert [float(row["loss"]) for row in rows] == [0.1, 1 / 3, 2e-9]
    assert [row["step"] for row in rows] == ["1", "2", "3"]


@pytest.mark.slow
def test_a_run_that_broke_off_and_was_resumed_has_the_metrics_of_a_straight_one(small, tmp_path):
    class Killed(BaseException):
        pass

    def break_off(record):
        if record.metrics and record.step == 5:
            raise Killed

    options = ("steps=7", "save_steps=2", "held_out_fraction=0.5", "evaluate_steps=4")

    def sinks(name):
        return [MetricsFiles(tmp_path / name), TensorBoard(tmp_path / name)]

    straight = small.train(tmp_path / "straight.safetensors", *options, events=TrainingEvents(sinks=sinks("straight")))
    with pytest.raises(Killed):
        small.train(tmp_path / "a.safetensors", *options, events=TrainingEvents(sinks=sinks("a"), on_step=break_off))
    broken_off = read_lines(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a kill may leave
    small.train(tmp_path / "a.safetensors", *options, events=TrainingEvents(sinks=sinks("a")), resume=True)

    assert len(broken_off) == 5  # one more than the state of step 4 knows
    lines = read_lines(tmp_path / "a")
    assert lines == [{"step": number, **record} for number, record in enumerate(straight.records, start=1)]
    assert set(lines[0]) >= TRL_NAMES and set(lines[3]) >= {f"eval/{name}" for name in TRL_NAMES}
    for name in ("metrics.csv", "metrics.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    events = read_events(tmp_path / "a")
    assert events == read_events(tmp_path / "straight")
    assert [step for step, _ in events["rewards/margins"]] == list(range(1, 8))
    assert [step for step, _ in events["eval/loss"]] == [4, 7]


@pytest.mark.parametrize(
    ("library", "make"),
    [("tensorboard", lambda: TensorBoard("x")), ("wandb", lambda: WeightsAndBiases("project", "name", "id", {}))],
)
def test_a_library_that_is_not_there_is_one_line(monkeypatch, library, make):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"{library} is not installed: pip install {library}, or train without it"):
        make()
