"""Drawing and judging a plan: resumable by image, equal however it was stopped, judged without drawing again."""

import dataclasses
import json
import resource

import pytest
import rendered_arms
from PIL import Image
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.evaluation.evaluate import Demands, prepare, report_again, run
from safety_experts.evaluation.gates import parse_fail_if, parse_fail_unless
from safety_experts.evaluation.plan import BASE_ARM, NULL_ARM
from safety_experts.evaluation.runner import run_plan
from safety_experts.evaluation.samples import SampleStore, read_samples
from safety_experts.evaluation.schema import ALL, SAFE

pytestmark = pytest.mark.slow


class _Corner:
    """A judge that costs nothing."""

    version, batch_size = "1", 4

    def read(self, images, prompts):
        return [{"violence": image.getpixel((0, 0))[0] / 255} for image in images]


CORNER = {"toy-oracle": _Corner()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    drawer = RenderedArms()
    outcome = run(folder, toy_plan(toy_suite(8)), drawer, [toy_oracle()], metrics=["toy-adherence"])
    return folder, outcome, drawer


def _finish(folder, plan):
    run_plan(folder, plan, RenderedArms(), CORNER)
    SampleStore(folder).finish(plan.order())
    return (folder / "samples.jsonl").read_bytes()


def test_every_image_has_a_line_and_rates_are_those_of_the_scenes(evaluated):
    folder, outcome, drawer = evaluated
    samples = read_samples(folder / "samples.jsonl")
    assert len(samples) == 3 * 2 * 16 == sum(drawer.drawn.values())
    rates = {(row.arm, row.group): row for row in outcome.report.results if row.rule == "toy-oracle:own-mark"}
    assert rates["base", "violence"].hits == rates["null", "violence"].hits == 8
    left_out = sum(s.seed // 2 % 2 == 0 for s in samples if s.arm == "base" and "hate" in s.categories)
    assert left_out == 4 and rates["half", "hate"].hits == 8 - left_out
    assert rates["half", SAFE].hits == 0 and rates["half", ALL].n == 16
    assert outcome.finished and outcome.report.complete


def test_arms_share_their_noise_and_the_null_row_has_other_seeds(evaluated):
    samples = read_samples(evaluated[0] / "samples.jsonl")
    seeds = {arm: {s.pair_key: s.seed for s in samples if s.arm == arm} for arm in ("base", "half", "null")}
    assert seeds["base"] == seeds["half"]
    assert seeds["null"].keys() == seeds["base"].keys()
    assert not set(seeds["null"].values()) & set(seeds["base"].values())


def test_stopped_anywhere_it_ends_with_the_same_lines(evaluated, tmp_path):
    plan = toy_plan(toy_suite(8))
    expected = _finish(tmp_path / "straight", plan)
    for stop_after in (1, 4):
        folder = tmp_path / f"stopped{stop_after}"
        answers = iter([False] * stop_after)
        drawer = RenderedArms()
        assert not run_plan(folder, plan, drawer, CORNER, should_stop=lambda left=answers: next(left, True))
        assert sum(drawer.drawn.values()) == 8 * stop_after
        assert _finish(folder, plan) == expected


@pytest.mark.parametrize("size_bytes", [64, 4000])
def test_a_full_disk_is_one_line_and_what_there_is_goes_on(tmp_path, limit_files, size_bytes):
    """64 bytes take no picture, 4,000 take pictures and the lines of a few of them."""
    plan = toy_plan(toy_suite(8))
    expected = _finish(tmp_path / "straight", plan)
    limit_files(size_bytes)
    with pytest.raises(SafetyExpertsError, match="File too large") as caught:
        _finish(tmp_path / "full", plan)
    limit_files(resource.RLIM_INFINITY)
    assert "\n" not in str(caught.value)
    assert _finish(tmp_path / "full", plan) == expected


def test_two_processes_draw_what_one_does(tmp_path):
    plan = toy_plan(toy_suite(4))
    expected = _finish(tmp_path / "one", plan)
    for rank in (1, 0):
        run_plan(tmp_path / "two", plan, RenderedArms(), CORNER, rank=rank, num_processes=2)
    SampleStore(tmp_path / "two").finish(plan.order())
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == expected


def test_a_half_written_line_is_left_out_and_replaced(tmp_path):
    plan = toy_plan(toy_suite(4))
    expected = _finish(tmp_path / "a", plan)
    lines = expected.splitlines(keepends=True)
    (tmp_path / "a" / "samples.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:40])
    assert _finish(tmp_path / "a", plan) == expected


def test_another_judge_reads_the_images_that_are_there(evaluated, tmp_path):
    plan = toy_plan(toy_suite(4))
    _finish(tmp_path / "a", plan)
    drawer = RenderedArms()
    run_plan(tmp_path / "a", plan, drawer, {**CORNER, "second": _Corner()})
    assert drawer.drawn == {}
    samples = SampleStore(tmp_path / "a").finish(plan.order())
    assert all({name.partition("/")[0] for name in sample.scores} == {"toy-oracle", "second"} for sample in samples)


def test_a_broken_picture_is_drawn_again(tmp_path):
    plan = toy_plan(toy_suite(4))
    expected = _finish(tmp_path / "a", plan)
    sample = read_samples(tmp_path / "a" / "samples.jsonl")[0]
    (tmp_path / "a" / sample.image).write_bytes(b"\x89PNG")
    (tmp_path / "a" / "samples.jsonl").unlink()
    assert _finish(tmp_path / "a", plan) == expected


class _Blind:
    """A judge that cannot read anything bright at its corner: every second picture or so."""

    version, batch_size = "1", 4

    def read(self, images, prompts):
        return [{} if image.getpixel((0, 0))[0] % 2 else {"violence": 0.0, "hate": 0.0} for image in images]


def test_an_image_that_was_not_judged_is_counted_apart(tmp_path):
    plan = toy_plan(toy_suite(8), arms=[BASE_ARM])
    outcome = run(tmp_path / "a", plan, RenderedArms(), [toy_oracle()], judges={"toy-oracle": _Blind()})
    row = next(row for row in outcome.report.results if row.group == ALL and row.rule == "toy-oracle:own-mark")
    assert row.nones > 0 and row.n + row.nones == 16
    assert row.rate == 0.0 and row.rate_if_nones_unsafe == row.nones / 16
    assert "not judged" in outcome.page.read_text()
    assert all(sample.error for sample in read_samples(tmp_path / "a/samples.jsonl") if not sample.scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": {**rendered_arms.GENERATION, "steps": 2}}, "steps is 1 there and 2 here"),
        ({"suites": (toy_suite(3),)}, "it has other prompts"),
        ({"images_per_prompt": 2}, "images_per_prompt is 1 there and 2 here"),
        ({"model": {"name": "other", "sha256": "1" * 64, "family": "sd15"}}, "model.sha256"),
        (
            {"arms": (BASE_ARM, dataclasses.replace(rendered_arms.HALF, made_of=({"strength": 1.0},)))},
            "'half' was another expert or strength",
        ),
    ],
)
def test_a_folder_goes_on_only_as_it_began(tmp_path, change, message):
    plan = toy_plan(toy_suite(4))
    prepare(tmp_path / "a", plan, [toy_oracle()], Demands(), {})
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path / "a", dataclasses.replace(plan, **change), [toy_oracle()], Demands(), {})
    assert "\n" not in str(caught.value)


def test_an_arm_can_be_added_and_none_is_lost(tmp_path):
    both, one = toy_plan(toy_suite(4)), toy_plan(toy_suite(4), arms=[BASE_ARM])
    run(tmp_path / "a", one, RenderedArms(), [toy_oracle()], judges=CORNER)
    drawer = RenderedArms()
    run(tmp_path / "a", both, drawer, [toy_oracle()], judges=CORNER)
    assert "base" not in drawer.drawn
    run(tmp_path / "a", one, RenderedArms(), [toy_oracle()], judges=CORNER)
    plan = json.loads((tmp_path / "a/plan.json").read_text())
    assert {arm["id"] for arm in plan["arms"]} == {"base", "half", "null"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match="not empty and holds no evaluation"):
        prepare(tmp_path, toy_plan(toy_suite(1)), [toy_oracle()], Demands(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(InputError, match="holds no evaluation"):
        report_again(tmp_path)


def test_images_of_a_prompt_have_seeds_of_their_own_and_the_prompt_is_the_unit(tmp_path):
    plan = toy_plan(toy_suite(6, ["violence"]), images_per_prompt=3)
    outcome = run(tmp_path / "a", plan, RenderedArms(), [toy_oracle()], judges=CORNER)
    samples = read_samples(tmp_path / "a/samples.jsonl")
    of_prompt = [s for s in samples if s.arm == "base" and s.prompt_id == samples[0].prompt_id]
    assert len({s.seed for s in of_prompt}) == 3
    contrast = next(c for c in outcome.report.contrasts if (c.arm, c.group) == ("half", "violence"))
    assert contrast.method == "newcombe by prompt" and contrast.p is None


def test_gates_are_held_against_the_end_of_an_interval(evaluated):
    folder, outcome, _ = evaluated
    row = next(
        r for r in outcome.report.results if (r.arm, r.group, r.rule) == ("half", "violence", "toy-oracle:own-mark")
    )
    between = (row.rate + row.high) / 2
    name = "violence.toy-oracle:own-mark"
    demands = Demands(
        (
            parse_fail_if(f"{name} > {between:.4f}"),
            parse_fail_if(f"{name}.rate > {between:.4f}"),
            parse_fail_if(f"half/{name}.difference_high > 0.5"),
            parse_fail_unless("false-alarms.margin(0.02)"),
            parse_fail_unless("toy-adherence.margin(0.3)"),
        )
    )
    gates = report_again(folder, demands=demands).report.gates
    assert [(gate.arm, gate.kept) for gate in gates] == [
        ("half", False),
        ("half", True),
        ("half", True),
        ("half", False),
        ("half", True),
    ]
    assert gates[3].reason == "not testable at this n"


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([parse_fail_if("violins.toy-oracle:own-mark > 0.1")], "no group 'violins'"),
        ([parse_fail_if("violence.q16:argmax > 0.1")], "no rule 'q16:argmax'"),
        ([parse_fail_if("other/violence.toy-oracle:own-mark > 0.1")], "no arm 'other'"),
    ],
)
def test_a_gate_on_what_is_not_there_is_an_input_error(evaluated, gates, message):
    with pytest.raises(InputError, match=message):
        report_again(evaluated[0], demands=Demands(tuple(gates)))


@pytest.mark.parametrize("text", ["violence > 0.1", "violence.rule", "violence.rule > many"])
def test_a_gate_that_cannot_be_read_is_an_input_error(text):
    with pytest.raises(InputError, match="write it as"):
        parse_fail_if(text)


def test_stopped_before_the_first_image_there_is_nothing_to_report(tmp_path):
    with pytest.raises(SafetyExpertsError, match="stopped before the first image"):
        run(tmp_path / "a", toy_plan(toy_suite(1)), RenderedArms(), [toy_oracle()], should_stop=lambda: True)


def test_a_stopped_run_reports_on_what_there_is(tmp_path):
    answers = iter([False] * 5)
    plan = toy_plan(toy_suite(8), arms=[BASE_ARM, rendered_arms.HALF, NULL_ARM])
    outcome = run(
        tmp_path / "a",
        plan,
        RenderedArms(),
        [toy_oracle()],
        judges=CORNER,
        should_stop=lambda: next(answers, True),
    )
    assert not outcome.finished and not outcome.report.complete
    assert "not finished" in outcome.page.read_text()
    assert Image.open(tmp_path / "a" / read_samples(tmp_path / "a/samples.jsonl")[0].image).size == (64, 64)
