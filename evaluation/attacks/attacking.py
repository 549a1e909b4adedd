"""An attack from its settings: through the text encoder once, or through the denoiser of every arm."""

from collections.abc import Callable, Sequence

from ..plan import BASE, Arm
from ..suites import Suite
from .attack import DENOISER, AttackedPrompt, AttackLog, AttackSettings
from .denoiser_attack import WhiteBox, attack_arms
from .text_attack import attack_prompts
from .text_space import TextSpace


def find_prompts(
    model: WhiteBox,
    suite: Suite,
    arms: Sequence[Arm],
    settings: AttackSettings,
    *,
    log: AttackLog | None = None,
    on_prompt: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[AttackedPrompt]:
    """Search for every unsafe prompt of a suite that has a safe partner; those found before a stop are returned.

    Raises:
        InputError: no prompt has a safe partner, or the model has no such encoder or denoiser.
    """
    if settings.through == DENOISER:
        return attack_arms(model, suite, arms, settings, log=log, on_prompt=on_prompt, should_stop=should_stop)
    with model.carrying(BASE):
        space = TextSpace(model.clip_towers[0])
        return attack_prompts(space, suite, settings, log=log, on_prompt=on_prompt, should_stop=should_stop)
