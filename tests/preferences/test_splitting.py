"""Splits that do not leak, the report of leaks, datasets put together, and pictures of the numbers."""

import dataclasses
import itertools
import json
import random
from collections import Counter

import pytest
from PIL import Image
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.preferences.dataset import DatasetInfo, NewPair, PreferenceDataset
from safety_experts.preferences.leaks import find_leaks
from safety_experts.preferences.merging import merge_datasets
from safety_experts.preferences.near_duplicates import group_near, near_pairs, words_of
from safety_experts.preferences.pairs import PromptPair
from safety_experts.preferences.splitting import parse_parts, split_pairs

COLOURS = ("red", "green", "blue", "black", "white", "grey", "yellow", "purple")


def build(folder, prompts, info=None):
    dataset = PreferenceDataset.create(folder, info or DatasetInfo({}, {}))
    dataset.add_many(
        NewPair(
            PromptPair(prompt, f"safe {prompt}", (category,), number, "toy"),
            Image.new("RGB", (4, 4), (number % 256, number // 256, 0)),
            Image.new("RGB", (4, 4), (number % 256, number // 256, 200)),
        )
        for number, (prompt, category) in enumerate(prompts)
    )
    return dataset


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_prompts_are_those_that_comparing_all_with_all_finds(threshold):
    generator = random.Random(0)
    texts = [" ".join(generator.choices("abcdefghijkl", k=generator.randint(0, 9))) for _ in range(300)]
    others = texts[150:]
    sets = [words_of(text) for text in texts]

    def jaccard(a, b):
        return len(a & b) / len(a | b) if a | b else 0.0

    expected = {
        (i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold
    }
    assert {(i, j) for i, j, _ in near_pairs(texts, threshold=threshold)} == expected
    between = {(i, j) for i in range(150) for j in range(150) if jaccard(sets[i], sets[150 + j]) >= threshold}
    assert {(i, j) for i, j, _ in near_pairs(texts[:150], others, threshold)} == between


def test_groups_are_closed_also_by_way_of_others():
    texts = ["a b c d e", "x y", "a b c d f", "g b c d f", "x y"]
    # 4 of 6 words are common to the first and third, and to the third and fourth; 3 of 7 to the first and fourth.
    assert group_near(texts, 0.6) == [[0, 2, 3], [1, 4]]
    assert group_near(texts, 0.7) == [[0], [1, 4], [2], [3]]


@pytest.fixture
def large(tmp_path):
    """200 pairs: 50 scenes, each in four wordings that are near to each other; two categories, 3 to 1."""
    prompts = []
    for number in range(50):
        scene = f"a {COLOURS[number % 8]} shape number{number} on a table beside the{number} window with thorns"
        category = "violence" if number % 4 else "hate"
        prompts += [(text, category) for text in (scene, scene.upper(), f"{scene} now", f"{scene}, {scene}")]
    return build(tmp_path / "large", prompts)


def test_no_scene_stands_in_two_parts_and_every_pair_in_one(large):
    parts = split_pairs(large.pairs, {"train": 0.8, "held-out": 0.2})
    assert sorted(pair.id for pairs in parts.values() for pair in pairs) == sorted(large.ids)
    scenes = {name: {pair.prompt.lower().split()[3] for pair in pairs} for name, pairs in parts.items()}
    assert not scenes["train"] & scenes["held-out"]
    assert len(parts["held-out"]) == 40
    shares = Counter(pair.categories[0] for pair in parts["held-out"])
    assert abs(shares["hate"] - 13 * 4 / 5) <= 4  # one group of four more or less
    again = split_pairs(large.pairs[::-1], {"train": 0.8, "held-out": 0.2})
    assert {pair.id for pair in again["train"]} == {pair.id for pair in parts["train"]}, "the order of lines decided"
    other = split_pairs(large.pairs, {"train": 0.8, "held-out": 0.2}, seed=1)
    assert {pair.id for pair in other["train"]} != {pair.id for pair in parts["train"]}


def test_split_by_the_command_line_leaks_nothing_and_loses_nothing(large, tmp_path, capsys):
    large.set_review(large.pairs[0].id, "dropped")
    out = tmp_path / "parts"
    assert run(["dataset", "split", str(large.folder), "--out", str(out), "--parts", "a=1,b=1,c=2", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    parts = {name: PreferenceDataset.open(out / name) for name in "abc"}
    assert counts == {str(out / name): len(dataset.pairs) for name, dataset in parts.items()}
    assert sorted(counts.values()) == pytest.approx([50, 50, 100], abs=4)
    assert {pair.id: pair for dataset in parts.values() for pair in dataset.pairs} == {
        pair.id: pair for pair in large.pairs
    }
    assert all(dataset.check() == [] and dataset.info == large.info for dataset in parts.values())
    assert run(["dataset", "leaks", str(out / "a"), str(out / "c")]) == 0
    assert "nothing in common" in capsys.readouterr().out
    assert run(["dataset", "split", str(large.folder), "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_split_that_cannot_be_is_said(tmp_path):
    dataset = build(tmp_path / "one", [("a red circle", "hate"), ("a red circle!", "hate")])
    with pytest.raises(InputError, match="stays empty"):
        split_pairs(dataset.pairs, {"train": 0.8, "held-out": 0.2})
    for text in ("train", "train=1", "a=0,b=1", "a=x,b=1", "../a=1,b=1", "a=1,a=1", "a=inf,b=1"):
        with pytest.raises(InputError, match="parts:"):
            parse_parts(text)


def test_every_kind_of_leak_is_found_and_counted(tmp_path, capsys):
    prompts = [(f"a {colour} circle on a wooden table with some thorns", "hate") for colour in COLOURS[:4]]
    first = build(tmp_path / "first", prompts)
    info = DatasetInfo({}, {})
    second = PreferenceDataset.create(tmp_path / "second", info)
    images = [Image.new("RGB", (4, 4), (200, 200, number)) for number in range(8)]
    same = first.pairs[0]
    second.add(PromptPair(same.prompt, same.safe_prompt, ("hate",), same.seed), *images[:2])
    second.add(PromptPair("With some thorns: a green circle on a wooden table", "x", ("hate",), 9), *images[2:4])
    second.add(PromptPair(f"{prompts[2][0]} there", "x", ("hate",), 9), *images[4:6])
    with Image.open(first.image_paths(first.pairs[3])[1]) as image:
        second.add(PromptPair("something else", "x", ("hate",), 9), images[6], image.copy())
    leaks = {leak.kind: leak for leak in find_leaks(first, second, 0.9)}
    assert set(leaks) == {"same pair", "same prompt", "near prompt", "same image"}
    assert leaks["same pair"].examples == ((same.id, same.id),)
    assert leaks["same prompt"].examples == tuple(sorted([(same.id, same.id), (first.pairs[1].id, second.pairs[1].id)]))
    assert leaks["near prompt"].examples == ((first.pairs[2].id, second.pairs[2].id),)
    assert leaks["same image"].examples == ((first.pairs[3].id, second.pairs[3].id),)
    assert (leaks["same prompt"].num_first, leaks["same prompt"].num_second) == (2, 2)
    assert run(["dataset", "leaks", str(first.folder), str(second.folder)]) == 1
    printed = capsys.readouterr()
    assert "same image: 1 of 4 and 1 of 4" in printed.out and "thorns" not in printed.out + printed.err


def test_merged_datasets_hold_every_pair_once_and_no_conflict_silently(
    dataset, make_pair, draw, info, tmp_path, capsys
):
    other = PreferenceDataset.create(tmp_path / "other", info)
    for number in (0, 1, 20):
        other.add(make_pair(number), *draw(number))
    first, second = (pair.id for pair in dataset.pairs[:2])
    dataset.update_many({first: {"review": "accepted", "scores": {"a": 1}}, second: {"review": "flipped"}})
    other.update_many({first: {"scores": {"a": 2, "b": 3}, "chosen_unsafe": None}, second: {"review": "dropped"}})
    command = ["dataset", "merge", str(dataset.folder), str(other.folder), "--out", str(tmp_path / "all"), "--json"]
    assert run(command) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts == {"pairs in several datasets": 2, "reviews that differ, to be made again": 1}
    merged = PreferenceDataset.open(tmp_path / "all")
    assert list(merged.ids) == [*dataset.ids, make_pair(20).id]
    assert (merged.pair(first).scores, merged.pair(first).review) == ({"a": 1, "b": 3}, "accepted")
    assert (merged.pair(first).chosen_unsafe, merged.pair(second).review) == (False, None)
    assert merged.check() == [] and merged.info == dataset.info


def test_datasets_of_two_models_are_merged_only_when_that_is_asked_for(dataset, info, make_pair, draw, tmp_path):
    settings = dataclasses.replace(info, sampler=info.sampler | {"steps": 99})
    other = PreferenceDataset.create(tmp_path / "other", settings)
    other.add(make_pair(20), *draw(20))
    with pytest.raises(InputError, match=r"not made alike.*--mixed"):
        merge_datasets([dataset, other], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    pairs, _ = merge_datasets([dataset, other], tmp_path / "all", mixed=True)
    assert len(pairs) == 5
    assert PreferenceDataset.open(tmp_path / "all").info.sampler == {}


@pytest.mark.slow
def test_plots_are_pictures_of_the_numbers(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for number, pair in enumerate(dataset.pairs):
        scores = {f"toy/{side}/mark": number + len(side) for side in ("chosen", "rejected")}
        verdicts = {"toy/chosen": 0, "toy/rejected": 1, "other judge/chosen": number % 2, "other judge/rejected": 1}
        dataset.update(pair.id, scores=scores | verdicts | {"aesthetic": 0.5})
    out = tmp_path / "plots"
    assert run(["dataset", "stats", str(dataset.folder), "--plots", str(out), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["plots"]
    names = ["categories.png", "scores-aesthetic.png", "scores-toy.png", "judges.png"]
    assert written == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for path in written:
        with Image.open(path) as image:
            assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_agreement_is_the_share_of_images_with_one_verdict():
    from safety_experts.preferences.plots import _agreement

    first = {("a", "chosen"): True, ("a", "rejected"): True, ("b", "chosen"): False}
    second = {("a", "chosen"): True, ("a", "rejected"): False, ("c", "chosen"): False}
    assert _agreement(first, second) == 0.5
