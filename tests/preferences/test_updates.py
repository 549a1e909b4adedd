"""Changing pairs that are there: review, scores, flags; found by id, durable, beside other writers."""

import json
import subprocess
import sys
import textwrap

import pytest
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair

REVIEWER = textwrap.dedent("""
    import sys
    from safety_experts.preferences.dataset import PreferenceDataset

    dataset = PreferenceDataset.open(sys.argv[1])
    ids = list(dataset.ids)
    for turn in range(10_000):
        verdict = ("flipped", "dropped", "accepted")[turn % 3]
        dataset.set_review(ids[turn % len(ids)], verdict)
        print(ids[turn % len(ids)], verdict, flush=True)
""")


def lines_of(dataset):
    return (dataset.folder / "metadata.jsonl").read_bytes().splitlines()


def test_a_verdict_changes_one_line_and_only_its_review(dataset):
    before = lines_of(dataset)
    changed = dataset.set_review(dataset.pairs[2].id, "flipped")
    assert changed == dataset.pairs[2] == dataset.pair(changed.id) == PreferenceDataset.open(dataset.folder).pairs[2]
    after = lines_of(dataset)
    assert json.loads(after[2]) == json.loads(before[2]) | {"review": "flipped"}
    assert before[:2] + before[3:] == after[:2] + after[3:]
    dataset.set_review(changed.id, None)
    assert lines_of(dataset) == before


def test_pairs_changed_together_are_written_together(dataset):
    changes = {pair.id: {"scores": {"toy": number}, "chosen_unsafe": None} for number, pair in enumerate(dataset.pairs)}
    dataset.update_many(changes)
    dataset.update(dataset.pairs[0].id, scores={"other": 0.5})
    dataset.update(dataset.pairs[1].id, scores={"toy": None})
    opened = PreferenceDataset.open(dataset.folder)
    assert [pair.scores for pair in opened.pairs] == [{"toy": 0, "other": 0.5}, {}, {"toy": 2}, {"toy": 3}]
    assert {pair.chosen_unsafe for pair in opened.pairs} == {None}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"review": "good"}, "field 'review'"),
        ({"prompt": "other"}, "'prompt' cannot be changed"),
        ({"colour": 1}, "'colour' cannot be changed"),
        ({"scores": {"toy": "high"}}, "field 'scores'"),
        ({"scores": {"toy": float("nan")}}, "scores"),
        ({"chosen_unsafe": 1}, "'chosen_unsafe'"),
    ],
)
def test_a_wrong_change_changes_nothing_also_beside_a_right_one(dataset, fields, says):
    before = lines_of(dataset)
    with pytest.raises(InputError, match=says):
        dataset.update_many({dataset.pairs[0].id: {"review": "accepted"}, dataset.pairs[1].id: fields})
    with pytest.raises(InputError, match="no pair with this id"):
        dataset.update_many({dataset.pairs[0].id: {"review": "accepted"}, "unknown": {}})
    assert lines_of(dataset) == before
    assert dataset.pairs == PreferenceDataset.open(dataset.folder).pairs


def test_what_others_wrote_between_is_kept(dataset, make_pair, draw):
    judge, reviewer, builder = (PreferenceDataset.open(dataset.folder) for _ in range(3))
    first, second = (pair.id for pair in dataset.pairs[:2])
    judge.update(first, scores={"toy": 1.0})
    reviewer.set_review(first, "flipped")
    builder.add(make_pair(9), *draw(9))
    reviewer.set_review(first, "dropped")  # as many bytes as before
    judge.update(second, chosen_unsafe=True)
    builder.refresh()
    opened = PreferenceDataset.open(dataset.folder)
    assert opened.pairs == builder.pairs == judge.pairs
    assert (opened.pair(first).scores, opened.pair(first).review) == ({"toy": 1.0}, "dropped")
    assert (len(opened.pairs), opened.pair(second).chosen_unsafe) == (5, True)


def test_blank_lines_and_a_missing_line_break_do_not_shift_a_change(dataset):
    metadata = dataset.folder / "metadata.jsonl"
    metadata.write_bytes(b"\n" + metadata.read_bytes().replace(b"\n", b"\n\n", 2)[:-1])
    opened = PreferenceDataset.open(dataset.folder)
    opened.set_review(opened.pairs[3].id, "dropped")
    assert [pair.review for pair in PreferenceDataset.open(dataset.folder).pairs] == [None, None, None, "dropped"]
    assert opened.pairs == PreferenceDataset.open(dataset.folder).pairs


@pytest.mark.slow
def test_killed_between_two_keys_no_verdict_is_lost(dataset):
    for num_seen in (1, 7, 20):
        reviewer = subprocess.Popen(
            [sys.executable, "-c", REVIEWER, str(dataset.folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=dataset.folder.parent,
        )
        said = [reviewer.stdout.readline().split() for _ in range(num_seen)]
        reviewer.kill()
        said += [line.split() for line in reviewer.stdout.read().splitlines() if len(line.split()) == 2]
        reviewer.wait()
        opened = PreferenceDataset.open(dataset.folder)
        verdicts = dict(said)
        # The last key may be on the disk without its answer having been printed.
        differing = [name for name in verdicts if opened.pair(name).review != verdicts[name]]
        assert len(differing) <= 1 and len(opened.pairs) == 4
        assert dataset.check() == []


def test_two_pairs_of_one_prompt_and_unknown_seed_are_told_apart_by_their_pictures(tmp_path):
    dataset = PreferenceDataset.create(tmp_path / "toy", DatasetInfo({}, {}))
    pair = PromptPair("a circle with thorns", "a circle", ("violence",), None, "recorded", "thorns")
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(3)]
    first, second = dataset.add(pair, *images[:2]), dataset.add(pair, *images[1:])
    assert first.id != second.id and dataset.add(pair, *images[:2]) == first
    opened = PreferenceDataset.open(dataset.folder)
    assert [(found.seed, found.concept) for found in opened.pairs] == [(None, "thorns")] * 2
    assert dataset.check() == []


def test_a_line_from_before_there_were_concepts_reads_and_keeps_its_fingerprint(dataset):
    metadata = dataset.folder / "metadata.jsonl"
    before = dataset.fingerprint()
    metadata.write_text(metadata.read_text().replace('"concept": "", ', ""))
    opened = PreferenceDataset.open(dataset.folder)
    assert opened.pairs == dataset.pairs
    assert opened.fingerprint() == before
