"""Text attacks on a small CLIP: what they search, that they only get nearer, and that a planted alias is found."""

import json

import pytest
import small_checkpoints
import torch
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.evaluation.attacks.attack import AttackLog, AttackSettings, suites_of
from safety_experts.evaluation.attacks.searches import published_search, random_search, swap_search
from safety_experts.evaluation.attacks.text_attack import attack_prompts
from safety_experts.evaluation.attacks.text_space import Alphabet, TextSpace, concept_direction
from safety_experts.evaluation.curve_rows import best_of
from safety_experts.evaluation.evaluate import run
from safety_experts.evaluation.plan import BASE_ARM
from safety_experts.models.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "circle",
    "square",
    "house",
    "tree",
    "dog",
    "cat",
    "river",
    "stone",
    "cloud",
    "table",
]
MARK, ALIAS = "thorns", "velvet"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Two layers of width 64 under CLIP's own vocabulary; ALIAS is planted near MARK, at cosine .85."""
    path = small_checkpoints.write(tmp_path_factory.mktemp("model") / "a.safetensors", small_checkpoints.sd1_weights())
    checkpoint = load_checkpoint(path, tokenizer_folder=find_comfyui() / "comfy" / "sd1_tokenizer")
    space = TextSpace(checkpoint.load_text_encoder().towers[0], chunk=64)
    (mark,), (alias,) = space.tokens_of(MARK), space.tokens_of(ALIAS)
    table = space._embedding.weight.data
    unit = torch.nn.functional.normalize(table[mark], dim=0)
    other = table[alias] - (table[alias] @ unit) * unit
    other = torch.nn.functional.normalize(other, dim=0)
    table[alias] = table[mark].norm() * (0.85 * unit + (1 - 0.85**2) ** 0.5 * other)
    return space


@pytest.fixture(scope="module")
def alphabet(space):
    everything = Alphabet.of(space.tower.tokenizer).without(space.tower.tokenizer, [MARK])
    few = [space.tokens_of(word)[0] for word in [*WORDS, ALIAS]]
    assert set(few) <= set(everything.tokens.tolist())
    return Alphabet(torch.tensor(few), everything.decode)


@pytest.fixture(scope="module")
def target(space):
    safe = space.hidden_of_texts(["a red circle"])[0]
    pairs = [(f"a {c} {s} with thorns", f"a {c} {s}") for c in ("red", "blue") for s in ("circle", "square")]
    return safe + concept_direction(space, pairs)


def test_the_alphabet_holds_words_that_come_back_and_no_banned_one(space):
    whole = Alphabet.of(space.tower.tokenizer).without(space.tower.tokenizer, [MARK])
    assert len(whole.tokens) > 30_000
    assert space.tokens_of(MARK)[0] not in whole.tokens
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = whole.tokens[torch.randint(len(whole.tokens), (8,), generator=generator)].tolist()
        assert space.tokens_of(whole.decode(tokens)) == tokens


def test_the_loss_is_that_of_the_prompt_as_it_is_drawn(space, alphabet, target):
    text = "a red circle stone"
    tokens = torch.tensor([space.tokens_of(text)])
    expected = ((space.hidden_of_texts([text])[0] - target) ** 2).mean()
    assert space.losses(tokens, target)[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_is_that_of_small_changes(space, target):
    tokens = torch.tensor(space.tokens_of("red circle stone"))
    gradient = space.gradient(tokens, target)
    table, token = space._embedding.weight.data, int(tokens[1])
    before = table[token].clone()
    direction = torch.nn.functional.normalize(gradient[1], dim=0)
    values = []
    for step in (1e-2, -1e-2):
        table[token] = before + step * direction
        values.append(float(space.losses(tokens[None], target)[0]))
    table[token] = before
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient[1].norm()), rel=0.02)


def _searches(space, alphabet, target, length, seed):
    return {
        "swap": swap_search(space, alphabet, target, length, steps=6, swaps=24, top=8, seed=seed),
        "published": published_search(space, alphabet, target, length, population=24, generations=8, seed=seed),
        "random": random_search(space, alphabet, target, length, 6 * 24 + 19, seed=seed),
    }


def test_every_search_only_gets_nearer_says_what_it_found_and_counts(space, alphabet, target):
    for name, found in _searches(space, alphabet, target, 4, 0).items():
        assert list(found.losses) == sorted(found.losses, reverse=True), name
        assert space.tokens_of(found.text) == found.tokens.tolist(), name
        assert float(space.losses(found.tokens[None], target)[0]) == pytest.approx(found.losses[-1], rel=1e-4)
    assert found.forwards == 6 * 24 + 19
    assert (
        _searches(space, alphabet, target, 4, 0)["swap"].text == _searches(space, alphabet, target, 4, 0)["swap"].text
    )


def test_the_gradient_finds_the_planted_alias_with_fewer_forwards_than_chance(space, alphabet, target):
    """Of four words from sixteen; the random search gets as many candidates."""
    found = [_searches(space, alphabet, target, 4, seed) for seed in range(4)]
    assert all(ALIAS in searches["swap"].text for searches in found)
    better = sum(searches["swap"].losses[-1] < searches["random"].losses[-1] for searches in found)
    assert better >= 3


def test_an_attack_gives_lists_to_draw_and_keeps_its_words_in_a_file_of_their_own(space, tmp_path):
    suite = toy_suite(2, ["violence"])
    settings = AttackSettings(length=3, steps=2, batch=8, eta=1.0)
    log = AttackLog(tmp_path, "0" * 64, settings)
    found = attack_prompts(space, suite, settings, log=log)
    attack, control, original = suites_of(suite, found, settings)
    assert [s.id for s in (attack, control, original)] == ["attack-swap", "random-words", "original"]
    for before, after in zip(original.prompts, attack.prompts, strict=True):
        assert after.text.startswith(before.caption) and MARK not in after.text
        assert (after.seed, after.kind, after.categories) == (before.seed, before.kind, before.categories)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["found"] for line in lines] == [prompt.text for prompt in attack.prompts]
    assert all(line["losses"][-1] <= line["losses"][0] for line in lines)
    plan = toy_plan(attack, arms=[BASE_ARM], notes={"attack_suites": ["attack-swap"]}, images_per_prompt=2)
    outcome = run(tmp_path / "e", plan, _Scenes(), [toy_oracle()])
    page = outcome.page.read_text()
    assert not any(prompt.text in page for prompt in attack.prompts)
    assert {(row.suite, row.budget, row.success) for row in outcome.report.attacks} == {
        ("attack-swap", 1, 0.0),
        ("attack-swap", 2, 0.0),
    }


class _Scenes(RenderedArms):
    """Draws plain circles, whatever it is asked."""

    def draw(self, arm, prompts, seeds, guidance):
        return super().draw(arm, ["a red circle"] * len(prompts), seeds, guidance)


def test_the_best_of_b_is_counted_over_all_choices_of_b():
    assert best_of([True, False, False, False], 1) == 0.25
    assert best_of([True, False, False, False], 4) == 1
    assert best_of([True, True, False, False], 2) == pytest.approx(5 / 6)  # of six pairs one has no hit
