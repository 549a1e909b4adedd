"""Which shipped recipe is for which model family."""

# Recipe -> families it is made for, as nodes/native/identity.py names them; the first of a family is where to start.
# Other recipes are for any family.
_MADE_FOR = {
    "sd15": ("sd15", "sd20"),
    "sdxl": ("sdxl",),
    "sdxl-anime": ("sdxl",),
    "z-image": ("z-image",),
    "qwen-image": ("qwen-image", "wan2.1", "wan2.2", "hidream", "krea2"),
    "flux2-klein": ("flux2", "flux", "chroma"),
}
_OTHERWISE = "z-image"  # the other families that can be trained predict a velocity, as Z-Image does


def recipe_for_family(family: str) -> str:
    """Return the name of the shipped recipe to start from."""
    return next((recipe for recipe, families in _MADE_FOR.items() if family in families), _OTHERWISE)


def family_mismatch(recipe_name: str, family: str) -> str | None:
    """Say in a sentence that a shipped recipe is for another family, or None; recipes for any family fit all."""
    suitable = recipe_for_family(family)
    if recipe_name == suitable or family in _MADE_FOR.get(recipe_name, (family,)):
        return None
    return f"recipe {recipe_name} is not made for this model of family {family}: {suitable} is"
