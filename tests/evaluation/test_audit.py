"""A person's answers: the estimate they give, and its interval."""

import csv
import json
import re

import numpy as np
import pytest
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.commands import run as command
from safety_experts.errors import InputError
from safety_experts.evaluation.audit import (
    _of_strata,
    audit_arms,
    corrected_rate,
    draw_audit,
    read_answers,
    write_audit,
)
from safety_experts.evaluation.evaluate import run
from safety_experts.evaluation.results import Evaluation


class _HalfBlind:
    """Sees marks only where the first letter of the prompt's hash is even, so that it misses some."""

    version, batch_size = "1", 8

    def read(self, images, prompts):
        scores = toy_oracle().load().read(images, prompts)
        return [
            {name: value * (sum(map(ord, prompt)) % 2) for name, value in found.items()}
            for found, prompt in zip(scores, prompts, strict=True)
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    run(folder, toy_plan(toy_suite(6)), RenderedArms(), [toy_oracle()], judges={"toy-oracle": _HalfBlind()})
    write_audit(folder)
    return folder


def _answer(folder, path, limit=None):
    """Answer as the oracle sees it: unsafe where the scene has a mark."""
    key = json.loads((folder / "audit-key.json").read_text())["images"]
    prompts = {json.loads(line)["id"]: json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "answer"])
        for name, (arm, _, prompt_id, _) in list(key.items())[:limit]:
            line = prompts[prompt_id]
            has_mark = line["kind"] == "unsafe" and not (arm == "half" and line["seed"] // 2 % 2 == 0)
            writer.writerow([name, "unsafe" if has_mark else "safe"])
    return path


def test_the_page_hides_arms_and_prompts(folder):
    page = (folder / "audit.html").read_text()
    assert len(set(re.findall(r"data:image/webp;base64,[\w+/=]+", page))) > 10
    for secret in ("base", "half", "null", "thorns"):
        assert secret not in re.sub(r"base64|data:image[^\"]*", "", page)


def test_where_every_picture_was_looked_at_the_answer_is_the_truth(folder, tmp_path):
    evaluation = Evaluation.open(folder)
    answers = read_answers(folder, _answer(folder, tmp_path / "answers.csv"))
    audits = {audit.arm: audit for audit in audit_arms(evaluation, answers)}
    assert audits["base"].unsafe == audits["base"].low == audits["base"].high == 0.5
    assert audits["half"].unsafe == 0.25
    assert audits["base"].flagged < 0.5 and audits["base"].specificity == 1
    assert corrected_rate(audits["base"].flagged, audits["base"]) == pytest.approx(0.5)


def test_the_estimate_weighs_flagged_and_unflagged_pictures():
    # 20 of 100 flagged; 8 of 10 looked at are unsafe; of the unflagged 1 of 10: .2 · .8 + .8 · .1
    audit = _of_strata("a", [(True, 20, [True] * 8 + [False] * 2), (False, 80, [True] + [False] * 9)])
    assert audit.unsafe == pytest.approx(0.24)
    assert audit.sensitivity == pytest.approx(16 / 24) and audit.specificity == pytest.approx(72 / 76)
    assert audit.low < 0.24 < audit.high


@pytest.mark.slow
def test_the_interval_covers_the_truth_in_at_least_94_of_100_audits():
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        flagged, clear = generator.uniform(size=600) < 0.85, generator.uniform(size=1400) < 0.08
        truth = (flagged.sum() + clear.sum()) / 2000
        said = [generator.choice(stratum, 40, False).tolist() for stratum in (flagged, clear)]
        audit = _of_strata("a", [(True, 600, said[0]), (False, 1400, said[1])])
        covered.append(audit.low <= truth <= audit.high)
    assert np.mean(covered) >= 0.94


def test_equal_answers_of_a_few_are_no_certainty():
    audit = _of_strata("a", [(True, 500, [True] * 20), (False, 500, [False] * 20)])
    assert audit.low < 0.5 - 0.01 and audit.high > 0.5 + 0.01


def test_the_draw_takes_as_many_of_each_and_repeats_itself(folder):
    evaluation = Evaluation.open(folder)
    chosen = draw_audit(evaluation, 2)
    assert chosen == draw_audit(evaluation, 2) and len(chosen) == 3 * 2 * 2
    assert chosen != draw_audit(evaluation, 2, seed=1)


def test_the_command_says_what_the_answers_say(folder, tmp_path, capsys):
    assert command(["evaluate", "--audit", str(folder), "--answers", str(_answer(folder, tmp_path / "a.csv"))]) == 0
    assert "base: 50.0 % unsafe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,answer\nx,safe\n", "needs the columns"),
        ("image,answer\nother,safe\n", "line 2: this image is not of the audit"),
        ("image,answer\n", "holds no answers"),
    ],
)
def test_wrong_answers_are_a_one_line_error(folder, tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_answers(folder, tmp_path / "a.csv")
    with pytest.raises(InputError, match="holds no audit"):
        read_answers(tmp_path, tmp_path / "a.csv")
