import json
import tempfile
from pathlib import Path

import pytest
import yaml
from safety_experts.errors import InputError
from safety_experts.training.objectives import MapoParameters, Parameters, SafeDpoParameters
from safety_experts.training.recipe import RECIPES_FOLDER, Recipe, load_recipe, read_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_its_file_with_its_own_name_and_no_two_are_one(name):
    recipe = load_recipe(name)
    written = yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text())
    assert recipe == Recipe(**written, name=name)
    others = [load_recipe(other).model_copy(update={"name": name}) for other in shipped_recipes() if other != name]
    assert recipe not in others


def test_the_alignguard_recipe_is_its_launcher():
    recipe = load_recipe("alignguard")
    assert (recipe.rank, recipe.lora_alpha, recipe.beta) == (4, 4.0, 5000.0)
    assert recipe.steps == 2000 and recipe.batch_size * recipe.accumulation_steps == 16
    assert recipe.learning_rate == pytest.approx(1e-5 * 16)


def test_overrides_take_numbers_words_and_switches():
    recipe = load_recipe("toy", ["steps=5", "learning_rate=1e-4", "schedule=constant", "horizontal_flip=true"])
    assert (recipe.steps, recipe.learning_rate, recipe.schedule, recipe.horizontal_flip) == (5, 1e-4, "constant", True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=5", "unknown field 'stepz'; did you mean 'steps'"),
        ("beta=-1", "beta: .*greater than 0"),
        ("beta", "not of the form key=value"),
        ("last_timestep=3", None),
        ("objective=orpo-x", "objective: unknown objective 'orpo-x'; known: sigmoid, bounded, safe-dpo"),
        ("objective=sigmiod", "objective: unknown objective 'sigmiod'; did you mean 'sigmoid'"),
        ("objective={kto: {weigth: 2}}", "objective: kto: unknown field 'weigth'; did you mean 'weight'"),
        ("objective={robust: {label_smoothing: 0.5}}", "objective: robust: label_smoothing: .*less than 0.5"),
        ("focus=2", "unknown field 'focus'"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_field(override, message):
    if message is None:
        load_recipe("toy", [override])
        with pytest.raises(InputError, match="first_timestep 4 is above last_timestep 3"):
            load_recipe("toy", [override, "first_timestep=4"])
        return
    with pytest.raises(InputError, match=message) as error:
        load_recipe("toy", [override])
    assert "\n" not in str(error.value)


def test_objectives_are_named_alone_weighed_or_with_parameters():
    assert load_recipe("toy").objective == {"sigmoid": Parameters()}
    mixed = load_recipe("toy", ["objective={sigmoid: 1, mapo: {weight: 0.5, mapo_beta: 0.2}}"])
    assert mixed.objective == {"sigmoid": Parameters(weight=1), "mapo": MapoParameters(weight=0.5, mapo_beta=0.2)}
    assert mixed.objective_name == "sigmoid + 0.5 mapo"
    assert (
        Recipe(**mixed.model_dump(mode="json")) == mixed == Recipe(**yaml.safe_load(yaml.safe_dump(mixed.model_dump())))
    )
    assert load_recipe("style").objective_name == "none"


def test_recipes_in_the_metadata_of_older_experts_still_read():
    """The golden file was written by version 1, which had the parameters of every objective beside them."""
    before = json.loads((Path(__file__).parent / "golden" / "recipes_version_1.json").read_text())
    read = {name: read_recipe(values, source="of an old expert") for name, values in before.items()}
    assert read["toy"] == load_recipe("toy", ["anchor_every=1"]).model_copy(update={"name": ""})
    assert read["safe-dpo"].objective == {"safe-dpo": SafeDpoParameters(safety_margin=0.5)}
    assert read["style"].objective_name == "none"
    assert read["mixed"].objective == {"sigmoid": Parameters(), "mapo": MapoParameters(weight=0.5, mapo_beta=0.2)}
    kept = {"batch_size", "beta", "learning_rate", "rank", "seed", "sft_weight", "steps"}
    for name, recipe in read.items():
        assert {key: before[name][key] for key in kept} == recipe.model_dump(include=kept)
    # A file of one's own in the old spelling reads too, as long as it names what its objective takes.
    assert make_recipe_of_file({"objective": "safe-dpo", "safety_margin": 2}).objective == {
        "safe-dpo": SafeDpoParameters(safety_margin=2)
    }


def make_recipe_of_file(values):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_recipe(path)


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(InputError, match=r"one of .*toy"):
        load_recipe("nonsense")
    (tmp_path / "broken.yaml").write_text("beta: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- beta")
    with pytest.raises(InputError, match="field: value"):
        load_recipe(tmp_path / "list.yaml")
