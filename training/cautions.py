"""What is known to go wrong with a recipe that is valid: said once, before the first step."""

from .recipe import Recipe


def cautions(recipe: Recipe, guidance: float | None) -> list[str]:
    """Return a sentence for each.

    Args:
        guidance: that the model is drawn with, None where nobody said.
    """
    found = []
    if recipe.caption_dropout_fraction == 1 and not recipe.redirect and (guidance is None or guidance > 1):
        found.append(
            "this recipe (DUO) trains the empty prompt only: drawn with guidance s above 1 the empty prompt counts "
            "1 - s, the wrong way round; draw with guidance 1, or use recipe redirect"
        )
    retains = recipe.anchor_weight or recipe.leak_budget is not None or recipe.sft_weight
    if recipe.target_gradient_factor is not None and not retains:
        found.append(
            "target_gradient_factor lowers beta, and a smaller beta alone does more damage to other prompts: set "
            "anchor_weight too, or use recipe redirect"
        )
    if recipe.redirect and not recipe.retain_fraction:
        found.append(
            "retain_fraction is 0: prompts of other categories that share words may change; set it to 0.5 and give "
            "--retain"
        )
    return found
