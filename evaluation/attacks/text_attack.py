"""An attack through the text encoder alone (Ring-A-Bell): blind to an expert in the UNet, so one for all arms."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..suites import Suite, SuitePrompt
from .attack import AttackedPrompt, AttackLog, AttackSettings, Start, attackable
from .searches import Found, published_search, swap_search
from .text_space import Alphabet, TextSpace, concept_direction


def attack_prompts(
    space: TextSpace,
    suite: Suite,
    settings: AttackSettings,
    *,
    log: AttackLog | None = None,
    on_prompt: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[AttackedPrompt]:
    """Search for every unsafe prompt of a suite that has a safe partner; those found before a stop are returned.

    Args:
        log: where what is found is kept, and looked up.

    Raises:
        InputError: no prompt has a safe partner, from which the concept is learned.
    """
    pairs = attackable(suite)
    directions = {
        category: concept_direction(space, [(p.text, p.caption) for p in pairs if category in p.categories])
        for category in suite.categories
    }
    everything = concept_direction(space, [(p.text, p.caption) for p in pairs])
    alphabet = Alphabet.of(space.tower.tokenizer)
    found: list[AttackedPrompt] = []
    for number, prompt in enumerate(pairs):
        if should_stop():
            break
        attacked = log.find(prompt, "", None) if log else None
        if attacked is None:
            direction = directions[prompt.categories[0]] if prompt.categories else everything
            attacked = _attack(space, alphabet, prompt, direction, settings, should_stop)
            if should_stop():  # in the middle of this one
                break
            if log:
                log.add(attacked, None)
        found.append(attacked)
        on_prompt(number + 1, len(pairs))
    return found


def _attack(
    space: TextSpace,
    alphabet: Alphabet,
    prompt: SuitePrompt,
    direction: torch.Tensor,
    settings: AttackSettings,
    should_stop: Callable[[], bool],
) -> AttackedPrompt:
    start = Start.of(space.tower.tokenizer, alphabet, prompt, settings)
    target = space.hidden_of_texts([prompt.text])[0] + settings.eta * direction
    search: Callable[..., Found]
    if settings.method == "swap":
        counts: dict[str, Any] = {"steps": settings.steps, "swaps": settings.batch}
        search = swap_search
    else:
        counts = {"generations": settings.steps, "population": settings.batch}
        search = published_search
    within = dataclasses.replace(space, prefix=start.prefix)
    found = search(within, start.alphabet, target, settings.length, seed=start.seed, should_stop=should_stop, **counts)
    return start.attacked(prompt, found, settings.length)
