"""Judging a dataset: scores, verdicts, flags, resuming, versions, and what training makes of them."""

import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.evaluation.judges import JudgeChoice, JudgeKind, JudgeOptions, Rule, choose_judge
from safety_experts.evaluation.judging import JudgingStoppedError, combine, judge_dataset
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.preferences.verdicts import state_of
from safety_experts.toy.world import render_scene

# (mark of the chosen image, mark of the rejected one) -> what the oracle must say of the pair
KINDS = [
    ((None, "thorns"), "agreed"),
    (("thorns", None), "swapped"),
    (("thorns", "thorns"), "both-unsafe"),
    ((None, None), "both-safe"),
]


@pytest.fixture
def dataset(tmp_path):
    made = PreferenceDataset.create(tmp_path / "toy", DatasetInfo({}, {}))
    for index in range(12):
        chosen, rejected = KINDS[index % 4][0]
        pair = PromptPair(f"a red circle {index} with thorns", f"a red circle {index}", ("violence",), index)
        made.add(
            pair, render_scene("red", "circle", chosen, index), render_scene("red", "circle", rejected, 100 + index)
        )
    return made


class Counting:
    """Reads the red of the first pixel; knows how often it was asked."""

    batch_size = 3

    def __init__(self, version="1", stop_after=None):
        self.version, self.read_images, self.stop_after = version, 0, stop_after

    def read(self, images, prompts):
        self.read_images += len(images)
        if self.stop_after is not None and self.read_images > self.stop_after:
            raise KeyboardInterrupt
        return [{"red": image.getpixel((0, 0))[0] / 255} for image in images]

    def choose(self, name="counting", threshold=0.5):
        rules = {"red": Rule("red > threshold", lambda scores, options, categories: scores["red"] > threshold)}
        kind = JudgeKind("t", "https://a", "l", "s", "nothing", rules, lambda options, device: self)
        return JudgeChoice(name, "counting", kind, JudgeOptions(), "red")


def test_every_kind_of_pair_is_told_and_none_is_dropped(dataset):
    summary = judge_dataset(dataset, [choose_judge("toy-oracle")])

    reopened = PreferenceDataset.open(dataset.folder)
    assert [state_of(pair) for pair in reopened.pairs] == [state for _, state in KINDS] * 3
    assert [(pair.chosen_unsafe, pair.rejected_unsafe) for pair in reopened.pairs[:4]] == [
        (False, True),
        (True, False),
        (True, True),
        (False, False),
    ]
    assert all(pair.review is None for pair in reopened.pairs)
    assert reopened.pairs[1].scores["toy-oracle/chosen/violence"] == 1.0
    assert reopened.pairs[1].scores["toy-oracle/rejected"] == 0.0
    assert (summary.agreed, summary.doubtful, summary.pairs) == (3, 9, 12)
    assert summary.categories == {
        "violence": {"agreed": 3, "swapped": 3, "both-unsafe": 3, "both-safe": 3, "unjudged": 0}
    }
    assert "3 of 12 pairs agree with their labels; 9 are for review" in summary.to_text()
    assert reopened.check() == []


def test_training_takes_what_the_rule_lets_through(dataset):
    judge_dataset(dataset, [choose_judge("toy-oracle")])
    by_state = {state: [pair.id for pair in dataset.pairs if state_of(pair) == state] for _, state in KINDS}
    dataset.set_review(by_state["swapped"][0], "flipped")
    dataset.set_review(by_state["swapped"][1], "accepted")
    dataset.set_review(by_state["both-safe"][0], "accepted")
    dataset.set_review(by_state["agreed"][0], "dropped")
    dataset.set_review(by_state["agreed"][1], "flipped")

    def ids(rule):
        return {pair.id for pair in dataset.training_pairs("violence", rule)}

    # The flipped swapped pair now agrees; the flipped agreed one no longer does.
    assert ids("agreed") == {by_state["agreed"][2], by_state["swapped"][0]}
    reviewed = {by_state["swapped"][1], by_state["both-safe"][0], by_state["agreed"][1]}
    assert ids("agreed-or-accepted") == ids("agreed") | reviewed
    assert ids("all") == {pair.id for pair in dataset.pairs} - {by_state["agreed"][0]}
    assert all(
        (pair.chosen_unsafe, pair.rejected_unsafe) == (False, True) for pair in dataset.training_pairs(rule="agreed")
    )


def test_a_dataset_that_nobody_judged_has_no_agreed_pairs(dataset):
    """Its flags say what was meant, and must not look like what somebody saw."""
    assert all((pair.chosen_unsafe, pair.rejected_unsafe) == (False, True) for pair in dataset.pairs)
    with pytest.raises(InputError, match="none of 12 pairs is agreed; judge the dataset"):
        dataset.training_pairs(rule="agreed")


def test_nothing_is_judged_twice_and_a_stopped_run_goes_on(dataset):
    first = Counting(stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        judge_dataset(dataset, [first.choose()])
    second = Counting()
    reopened = PreferenceDataset.open(dataset.folder)
    assert all(state_of(pair) == "unjudged" for pair in reopened.pairs)  # half a judgement is none

    judge_dataset(reopened, [second.choose()])

    assert second.read_images == 24 - 9
    third = Counting()
    judge_dataset(reopened, [third.choose(threshold=0.99)])
    assert third.read_images == 0
    assert all(not pair.chosen_unsafe and not pair.rejected_unsafe for pair in reopened.pairs)


def test_cancel_keeps_what_was_read(dataset):
    judge, asked = Counting(), []
    with pytest.raises(JudgingStoppedError):
        judge_dataset(dataset, [judge.choose()], should_stop=lambda: asked.append(1) or len(asked) > 2)
    again = Counting()
    judge_dataset(dataset, [again.choose()])

    assert 0 < judge.read_images < 24
    assert again.read_images == 24 - judge.read_images


def test_scores_of_another_version_are_not_mixed_in(dataset):
    judge_dataset(dataset, [Counting("1").choose(), choose_judge("toy-oracle")])
    newer = Counting("2")

    judge_dataset(dataset, [newer.choose()])

    assert newer.read_images == 24
    assert all("toy-oracle/chosen/violence" in pair.scores for pair in dataset.pairs)  # nobody else's business


def test_an_image_that_cannot_be_read_is_unknown_and_said(dataset):
    broken = dataset.image_paths(dataset.pairs[0])[0]
    broken.write_bytes(broken.read_bytes()[:50])

    summary = judge_dataset(dataset, [choose_judge("toy-oracle")])

    assert state_of(dataset.pairs[0]) == "unjudged" and dataset.pairs[0].chosen_unsafe is None
    assert summary.judges["toy-oracle"].unknown == 1
    assert len(summary.problems) == 1 and broken.name in summary.problems[0]
    assert "1 could not be judged" in summary.to_text()


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([True, False], True),
        ([True, None], True),
        ([False, None], None),
        ([False, False], False),
        ([None], None),
    ],
)
def test_one_judge_is_enough_for_unsafe_and_all_are_needed_for_safe(verdicts, expected):
    assert combine(verdicts) is expected


def test_two_judges_of_one_name_are_refused(dataset):
    with pytest.raises(InputError, match="each once"):
        judge_dataset(dataset, [Counting().choose(), Counting().choose()])


def test_the_command_judges_and_prints_by_category(dataset, capsys):
    folder = str(dataset.folder)
    arguments = ["dataset", "judge", folder, "--judge", "toy-oracle", "--judge", "own=toy-oracle"]

    assert run([*arguments, "--set", "own.rule=own-mark", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreed"] == 3 and found["judges"]["own"]["rule"] == "own-mark"
    assert run(arguments) == 0
    assert "violence     12       3        3            3          3         0" in capsys.readouterr().out
    assert run(["dataset", "judge", "--list"]) == 0
    assert "rule genitalia: exposed genitalia" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "toy-oracle"], "no dataset: name its folder"),
        (["DIR"], "no judge: name one with --judge; there are classifier"),
        (["DIR", "--judge", "q16"], "option 'vectors' is missing: The two vectors"),
        (["DIR", "--judge", "vlm"], "option 'model' is missing"),
        (["DIR", "--judge", "clip-concepts"], "set its folder"),
        (
            ["DIR", "--judge", "clip-concepts", "--set", "clip-concepts.concepts={violence: a}"],
            "unsafe text | safe text",
        ),
        (["DIR", "--judge", "classifier", "--set", "classifier.folder=x"], "'unsafe_labels' is missing"),
    ],
)
def test_what_is_missing_is_named_in_one_line(dataset, capsys, arguments, message):
    given = [str(dataset.folder) if argument == "DIR" else argument for argument in arguments]

    assert run(["dataset", "judge", *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


KILLED = """
import os, sys
from safety_experts.evaluation import judging
from safety_experts.evaluation.judges import choose_judge
from safety_experts.preferences.dataset import PreferenceDataset

judging._FLUSH_SECONDS, judging._FLUSH_SHARE = 0.0, 1e9  # after every score
oracle = choose_judge("toy-oracle")
judge = oracle.load()
judge.batch_size = 2
judging.judge_dataset(PreferenceDataset.open(sys.argv[1]), [oracle.__class__(
    oracle.name, oracle.kind_name, oracle.kind, oracle.options, oracle.rule, lambda device: judge
)], on_progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_killed_while_judging_it_goes_on_and_loses_nothing(dataset):
    for kill_at in (6, 14):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(dataset.folder)], stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if int(line) >= kill_at:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        reopened = PreferenceDataset.open(dataset.folder)
        kept = sum(key.endswith("/violence") for pair in reopened.pairs for key in pair.scores)
        assert kill_at <= kept <= 24
        assert len(reopened.pairs) == 12

    summary = judge_dataset(PreferenceDataset.open(dataset.folder), [choose_judge("toy-oracle")])

    assert (summary.agreed, summary.doubtful) == (3, 9)


def test_judge_train_fits_and_converts(tmp_path, clip_folder, capsys):
    import small_clips

    for name, mark in (("safe", None), ("unsafe", "stripes")):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(small_clips.scenes(mark, 40, 300)):
            picture.save(tmp_path / name / f"{number}.png")
    fitted, converted = tmp_path / "fitted.safetensors", tmp_path / "converted.safetensors"
    folders = ["--clip", clip_folder, "--safe", tmp_path / "safe", "--unsafe", tmp_path / "unsafe"]

    assert run(["judge-train", *map(str, folders), "--out", str(fitted), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out_accuracy"]["value"] >= 0.9
    (tmp_path / "numbers.json").write_text(json.dumps([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]]))
    assert run(["judge-train", "--convert", str(tmp_path / "numbers.json"), "--out", str(converted)]) == 0
    assert "two vectors of 3 numbers" in capsys.readouterr().out
    assert run(["judge-train", "--convert", str(fitted), "--out", str(converted)]) == 2  # it exists
    Image.new("RGB", (8, 8)).save(tmp_path / "safe" / "broken.png")
    (tmp_path / "safe" / "broken.png").write_bytes(b"no picture")
    assert run(["judge-train", *map(str, folders), "--out", str(tmp_path / "new.safetensors")]) == 2
    assert "broken.png" in capsys.readouterr().err
