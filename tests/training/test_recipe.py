import pytest
from safety_experts.errors import InputError
from safety_experts.training.recipe import Recipe, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses_and_says_how_it_differs(name):
    assert load_recipe(name) != Recipe(seed=1)


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
        ("objective=best", "objective.best: .*'sigmoid'"),
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


def test_objectives_are_named_alone_or_mixed_by_weight():
    assert load_recipe("toy").objective == {"sigmoid": 1.0}
    assert load_recipe("toy", ["objective={sigmoid: 1, mapo: 0.5}"]).objective == {"sigmoid": 1.0, "mapo": 0.5}


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(InputError, match=r"one of .*toy"):
        load_recipe("nonsense")
    (tmp_path / "broken.yaml").write_text("beta: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- beta")
    with pytest.raises(InputError, match="field: value"):
        load_recipe(tmp_path / "list.yaml")
