"""Which shipped recipe is for which model family."""

# SD3 and FLUX have no recipe of their own yet: they take the one with the gentlest learning rate.
_RECIPES = {"sd15": "sd15", "sd20": "sd15", "sdxl": "sdxl"}
_OTHERWISE = "sdxl"


def recipe_for_family(family: str) -> str:
    """Return the name of the shipped recipe to start from."""
    return _RECIPES.get(family, _OTHERWISE)


def family_mismatch(recipe_name: str, family: str) -> str | None:
    """Say in a sentence that a shipped recipe is for another family, or None; recipes for any family fit all."""
    suitable = recipe_for_family(family)
    if recipe_name not in _RECIPES.values() or recipe_name == suitable:
        return None
    return f"recipe {recipe_name} is not made for this model of family {family}: {suitable} is"
