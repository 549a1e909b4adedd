"""Pair Guard in a real ComfyUI: what it draws is what ComfyUI, or the published code, draws by other means.

The numbers come from `comfyui_guards.py`, which says what each is compared with. Low-rank terms, and predictions made
in other batches, round differently; an effect is a hundred times larger.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_checkpoints as small
import small_flow_checkpoints as flow
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint

WORKER = Path(__file__).with_name("comfyui_guards.py")
FAMILIES = ("eps", "v", "flow")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    path = small.write(tmp_path_factory.mktemp("guards") / "sd3.safetensors", small.random_weights(flow.sd3_shapes()))
    command = [sys.executable, str(WORKER), str(find_comfyui()), str(ensure_toy_checkpoint()), str(path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout[finished.stdout.index("{") :])


def assert_same(found: dict, case: str) -> None:
    difference, effect = found[case]
    assert effect > 1e-2, "the guard did nothing"
    assert difference < 0.01 * effect


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [1, 3])
def test_the_pair_guard_is_comfyuis_own_weighted_mean_of_conditionings(found, family, cfg):
    assert_same(found, f"pair {family} cfg {cfg}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [1, 3])
def test_sld_is_the_published_one_in_noise_predictions(found, family, cfg):
    assert_same(found, f"sld {family} cfg {cfg}")


def test_sld_without_sigma_is_found_out(found):
    with pytest.raises(AssertionError):
        assert_same(found, "sld without sigma")


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral", "lcm", "ddim"])
def test_every_kind_of_sampler_is_guarded(found, sampler):
    assert_same(found, f"sampler {sampler}")


@pytest.mark.parametrize("guider", ["PerpNeg", "DualModel"])
def test_other_guiders_are_guarded(found, guider):
    assert_same(found, f"guider {guider}")


def test_a_guider_of_two_prompts_is_refused(found):
    assert "does not know how Guider_DualCFG joins its prompts" in found["guider DualCFG"]


def test_a_perturbed_prediction_is_not_guarded_once_more(found):
    """Two images: each step the prompt's two rows, four of the guard, then two of the damaged model."""
    assert found["rows with perturbed attention"] == [2, 4, 2] * 3


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("closed by presence", 3 * 4 + 4),  # the first third of three steps decides
        ("closed by strength", 3 * 4),
        ("closed by text", 3 * 4),
        ("closed outside its part", 3 * 4),
        ("closed sld", 3 * 4 + 4),
    ],
)
def test_a_closed_gate_gives_the_base_picture_to_the_bit_and_soon_costs_nothing(found, case, rows):
    assert found[case] == [0.0, rows]


def test_of_a_batch_only_the_open_images_change(found):
    closed, opened = found["half open"]

    assert closed == 0.0
    assert opened > 0.05


def test_a_second_sampling_begins_anew_and_the_base_model_is_as_before(found):
    assert found["the same again"] == [0.0, 0.0]


def test_each_image_is_guarded_against_its_own_concept(found):
    assert_same(found, "choice of a concept")


def test_where_what_is_allowed_is_nearer_nothing_acts(found):
    """Without presence to be above: the nearest of all acts, unless it is allowed."""
    assert_same(found, "where what is allowed is further")
    assert found["where what is allowed is nearer"] == found["nothing but what is allowed"] == 0.0


@pytest.mark.parametrize("family", ["eps", "flow"])
def test_the_guards_predictions_are_made_without_an_expert_in_the_weights(found, family):
    assert_same(found, f"expert in the weights, {family}")


def test_the_guards_predictions_are_made_without_an_expert_behind_a_gate(found):
    assert_same(found, "expert behind a gate, on a guarded model")


@pytest.mark.parametrize("family", ["eps", "flow"])
def test_a_category_that_an_expert_covers_is_left_to_it(found, family):
    assert found[f"covered by the expert, {family}"] == 0.0


@pytest.mark.parametrize("order", ["expert, guard, guard", "guard, guard, gated expert"])
def test_two_guards_and_an_expert_stack(found, order):
    assert_same(found, f"stack: {order}")
