"""Which shipped recipe is for which model family."""

import pytest
from safety_experts.training.family_recipes import family_mismatch, recipe_for_family
from safety_experts.training.recipe import shipped_recipes


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl", "z-image", "qwen-image", "flux2", "sd3", "flux"])
def test_every_family_has_a_shipped_recipe_that_fits_it(family):
    name = recipe_for_family(family)

    assert name in shipped_recipes()
    assert family_mismatch(name, family) is None


@pytest.mark.parametrize(
    ("recipe", "family", "fits"),
    [
        ("sdxl", "sd15", False),
        ("sd15", "sdxl", False),
        ("sd15", "sd20", True),
        ("toy", "sdxl", True),
        ("duo", "sd3", True),
        ("sdxl-anime", "sdxl", True),
        ("sdxl", "z-image", False),
        ("z-image", "sd3", True),
        ("qwen-image", "krea2", True),
        ("flux2-klein", "flux", True),
        ("flux2-klein", "z-image", False),
    ],
)
def test_a_recipe_of_another_family_is_said(recipe, family, fits):
    said = family_mismatch(recipe, family)

    assert (said is None) == fits
    assert fits or (recipe in said and family in said)
