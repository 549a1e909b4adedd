"""Prompt guards on the toy world's prompts, read by the text tower of a small CLIP that was never trained.

Its states say which words a prompt has and nothing of what they mean, so these tests are of the training, the
threshold and the file; whether a guard understands a prompt is measured with a real CLIP, or not at all.
"""

import json
from pathlib import Path

import pytest
import small_clips
import torch
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.errors import InputError
from safety_experts.guards.clip_texts import ClipTexts
from safety_experts.guards.prompt_guard import Decision, Matcher, read_matcher, read_prompt_guard, write_prompt_guard
from safety_experts.guards.prompt_guard_training import Options, concept_of, train_prompt_guard
from safety_experts.preferences.pairs import PromptPair, write_prompt_pairs
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import COLOURS, SHAPES, taxonomy

CATEGORIES = ["violence", "hate", "shocking"]
HELD_OUT = [(colour, shape) for colour in COLOURS for shape in SHAPES][::3]
MARKS = {"violence": "thorns", "hate": "stripes", "shocking": "a ring"}
NEAR_MISSES = ("a hat", "a long tail", "two eyes", "a small door", "a blue sky", "green leaves", "a house", "a tree")


def pairs_of(categories=CATEGORIES) -> list[PromptPair]:
    scenes = [f"a {colour} {shape}" for colour, shape in HELD_OUT]
    return [pair for pair in expand_taxonomy(taxonomy(categories)) if pair.safe_prompt not in scenes]


def near_misses(scenes) -> list[str]:
    return [f"a {colour} {shape} with {thing}" for colour, shape in scenes for thing in NEAR_MISSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = find_comfyui() / "comfy" / "sd1_tokenizer"
    return small_clips.write_text_tower(tmp_path_factory.mktemp("prompt_guard") / "clip", tokenizer)


@pytest.fixture(scope="module")
def clip(folder) -> ClipTexts:
    return ClipTexts(folder, "cpu")


@pytest.fixture(scope="module")
def guard(clip):
    seen = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    harmless = [text for text in near_misses(seen) if "tree" not in text and "door" not in text]
    options = Options(false_positive_rate=0.02, steps=100, leave_out=False)
    return train_prompt_guard(pairs_of(), clip.read, options, harmless=harmless)


def opened(guard, clip, prompts) -> list[list[str]]:
    rows = [guard.opened(clip.read(prompt).tokens[None])[0].tolist() for prompt in prompts]
    return [[name for name, is_open in zip(guard.concepts, row, strict=True) if is_open] for row in rows]


def test_in_scenes_never_seen_each_category_opens_on_its_own_words_alone(guard, clip):
    for category, mark in MARKS.items():
        prompts = [f"a {colour} {shape} with {mark}" for colour, shape in HELD_OUT]
        found = opened(guard, clip, prompts)
        assert sum(names == [category] for names in found) >= len(prompts) - 1, category


def test_safe_prompts_and_near_misses_in_scenes_never_seen_stay_closed(guard, clip):
    """Near misses are as long as the unsafe prompts; `a tree` and `a small door` were in no training either."""
    prompts = [f"a {colour} {shape}" for colour, shape in HELD_OUT] + near_misses(HELD_OUT)[:: len(HELD_OUT) - 1]
    found = opened(guard, clip, prompts)

    assert sum(map(bool, found)) <= 0.1 * len(prompts)
    assert opened(guard, clip, [""]) == [[]]


def test_a_synonym_stays_closed_by_construction_as_this_clip_knows_no_meaning(guard, clip):
    found = opened(guard, clip, [f"a {colour} {shape} with spikes" for colour, shape in HELD_OUT])

    assert sum("violence" in names for names in found) < len(found) / 2


def test_what_it_says_of_itself_is_of_prompts_held_out_of_its_training(guard):
    """A fifth of the 16 scenes is held out; the rate is what was asked for."""
    facts = guard.facts
    assert {name: known.num_unsafe for name, known in facts.categories.items()} == dict.fromkeys(sorted(CATEGORIES), 4)
    assert facts.num_safe == 4 + 20  # and of 96 near misses
    assert facts.false_positive_rate <= 0.05
    assert all(known.recall >= 0.75 for known in facts.categories.values())


def test_a_long_prompt_is_as_unsafe_as_the_worst_of_its_parts(guard, clip):
    """The words are in the second part, which other readers of 77 tokens never see."""
    unsafe, safe = (clip.read("a blue hat " * 30 + text).tokens for text in ("with thorns", ""))
    parts = [guard.scores(tokens.reshape(2, 77, -1)) for tokens in (unsafe, safe)]

    assert torch.allclose(guard.scores(unsafe[None]), parts[0].amax(dim=0, keepdim=True), atol=1e-5)
    assert torch.allclose(parts[0][0], parts[1][0], atol=1e-5)
    assert parts[0][1, 2] > parts[1][1, 2] + 0.05  # violence


def test_padding_of_zeros_changes_nothing(guard, clip):
    tokens = clip.read("a red circle with thorns").tokens[None]
    padded = torch.cat([tokens[:, :20], torch.zeros(1, 43, tokens.shape[2])], dim=1)

    assert torch.allclose(guard.scores(padded), guard.scores(tokens[:, :20]), atol=1e-5)
    assert not guard.opened(torch.zeros(1, 77, guard.width)).any()


def test_a_file_gives_the_same_scores(guard, clip, tmp_path):
    path = tmp_path / "guard.safetensors"
    write_prompt_guard(guard, path)
    read = read_prompt_guard(path)
    tokens = clip.read("a red circle with thorns").tokens[None]

    assert read.facts == guard.facts
    assert torch.allclose(read.scores(tokens), guard.scores(tokens), atol=1e-6)


def test_the_architecture_has_as_many_weights_as_the_published_one():
    assert sum(parameter.numel() for parameter in Matcher(768).parameters()) == 1_312_513


def test_the_score_is_the_published_one_written_out():
    """One prompt, one concept, head by head."""
    torch.manual_seed(0)
    matcher, tokens, concept = Matcher(8), torch.randn(5, 8), torch.randn(8)
    with torch.no_grad():
        keys, values, query = matcher.key(tokens), matcher.value(tokens), matcher.query(concept)
        heads = []
        for start in range(0, 512, 32):
            part = slice(start, start + 32)
            weights = torch.softmax(keys[:, part] @ query[part] / 32**0.5, dim=0)
            heads.append(weights @ values[:, part])
        expected = torch.cosine_similarity(matcher.found(torch.cat(heads)), matcher.wanted(query), dim=0)
        found = matcher(tokens[None], concept[None])

    assert torch.allclose(found, expected.reshape(1, 1), atol=1e-6)


def test_published_names_are_read(guard, tmp_path):
    from safetensors.torch import save_file

    names = {"key": "x1_to_key", "query": "x2_to_query", "value": "x1_to_value", "found": "final_mlp"}
    names |= {"wanted": "mlp_query1", "temperature": "tempr"}
    state = {
        ".".join([names[name.split(".")[0]], *name.split(".")[1:]]): tensor.clone()
        for name, tensor in guard.matcher.state_dict().items()
    }
    save_file(state, tmp_path / "published.safetensors")
    read = read_matcher(tmp_path / "published.safetensors")

    assert all(torch.equal(tensor, guard.matcher.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_another_text_encoder_is_found_out(guard, clip):
    guard.check_encoder(guard.probe)
    with pytest.raises(InputError, match="trained with another text encoder"):
        guard.check_encoder(torch.roll(guard.probe, 1))


@pytest.mark.parametrize(
    ("prompt", "safe", "concept", "expected"),
    [
        ("a red circle with thorns", "a red circle", "", "with thorns"),
        ("a red circle with thorns", "a red circle", "Thorns ", "thorns"),
        ("one two three", "other words here", "", "one two three"),
        ("a b c d e f g h i j k", "x", "", "violence"),
    ],
)
def test_a_concept_is_what_the_safe_prompt_lacks(prompt, safe, concept, expected):
    assert concept_of(PromptPair(prompt, safe, ("violence",), 0, concept=concept)) == expected


def test_too_few_scenes_are_refused(clip):
    pairs = [PromptPair(f"a {n} with thorns", f"a {n}", ("violence",), 0) for n in range(9)]
    with pytest.raises(InputError, match="9 different safe prompts"):
        train_prompt_guard(pairs, clip.read, Options())


def test_a_decision_is_the_same_for_every_conditioning():
    decision = Decision({"hate": False, "violence": True})

    assert decision.opened(torch.zeros(2, 3, 5)).tolist() == [[False, True]] * 2


def test_the_command_trains_and_measures_concepts_that_were_left_out(folder, tmp_path, capsys):
    write_prompt_pairs(tmp_path / "pairs.jsonl", pairs_of(["violence", "hate"]))
    arguments = [
        "--clip",
        folder,
        "--prompts",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "g.safetensors",
    ]
    assert run(["guard", "train", *map(str, arguments), "--steps", "10", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["concepts"] == 2
    assert found["left_out"]["num_unsafe"] == 32  # each concept once, its 16 prompts
    assert read_prompt_guard(tmp_path / "g.safetensors").facts.num_safe == 4
