"""Every foreign format there and back, and as others write it."""

import dataclasses
import io
import json

import pytest
from PIL import Image
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.exporting import export_dataset
from safety_experts.preferences.formats import FORMATS
from safety_experts.preferences.importing import import_dataset
from safety_experts.preferences.pairs import PromptPair

# The file of an export that may be named instead of its folder.
FILES = {"coprov2": "train.csv", "pickapic": "train.parquet", "hpdv2": "train.json"}


def png(colour, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def various(dataset, make_pair, draw):
    """A dataset with everything a pair can hold, in texts that formats like to break."""
    hard = 'a "red", circle; with\nthorns and ünïcode 円'
    dataset.add(PromptPair(hard, "a circle", ("hate", "my-own"), None, "recorded", "thorns"), *draw(10))
    dataset.add(PromptPair(hard, "a circle", ("hate",), None, "recorded"), *draw(11))
    dataset.add(PromptPair("without a safe prompt", "", (), 7, ""), *draw(12), scores={"toy": 0.25}, review="accepted")
    dataset.update(dataset.pairs[0].id, chosen_unsafe=None, rejected_unsafe=False, scores={"toy": -1.5, "b": 3})
    return dataset


def without_place(pair):
    """A pair without its file names, which only say where the images lie."""
    return dataclasses.replace(pair, chosen_file_name="a", rejected_file_name="b")


def pixels(dataset, pair):
    return [Image.open(path).convert("RGB").tobytes() for path in dataset.image_paths(pair)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_dataset_comes_back_the_same(various, tmp_path, name):
    out = tmp_path / "exported"
    assert export_dataset(various, name, out) == 7
    back = import_dataset(name, out, tmp_path / "back")
    assert back.skipped == {}
    assert {without_place(pair) for pair in map(_hashable, back.dataset.pairs)} == {
        without_place(pair) for pair in map(_hashable, various.pairs)
    }
    for pair in back.dataset.pairs:
        assert pixels(back.dataset, pair) == pixels(various, various.pair(pair.id))
    assert back.dataset.check() == []
    again = import_dataset(name, out / FILES.get(name, ""), tmp_path / "back")
    assert again.dataset.pairs == back.dataset.pairs, "a second import added something"


def _hashable(pair):
    return dataclasses.replace(pair, scores=_Scores(pair.scores))


class _Scores(dict):
    def __hash__(self):
        return hash(tuple(sorted(self.items())))


@pytest.mark.parametrize("name", FORMATS)
def test_without_our_own_column_prompt_and_images_come_back(various, tmp_path, name):
    out = tmp_path / "exported"
    export_dataset(various, name, out)
    (out / "safety_experts.jsonl").unlink(missing_ok=True)
    for path in [*out.glob("*.jsonl"), *out.glob("*.json"), *out.glob("*.csv")]:
        path.write_text(_without_our_fields(path), encoding="utf-8", newline="")
    for path in out.glob("*.parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        parquet.write_table(table.drop_columns("safety_experts"), path)
    back = import_dataset(name, out / FILES.get(name, ""), tmp_path / "back", categories=("violence",)).dataset
    expected = sorted((pair.prompt.strip(), *pixels(various, pair)) for pair in various.pairs)
    assert sorted((pair.prompt, *pixels(back, pair)) for pair in back.pairs) == expected
    if name not in ("coprov2", "imagefolder"):
        assert {(pair.seed, pair.categories, pair.chosen_unsafe) for pair in back.pairs} == {
            (None, ("violence",), None)
        }


def _without_our_fields(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        kept = ("image_0", "image_1", "prompt", "prefer_0", "prefer_1", "chosen_file_name", "rejected_file_name")
        records = [json.loads(line) for line in text.splitlines()]
        return "".join(json.dumps({key: row[key] for key in kept if key in row}) + "\n" for row in records)
    if path.name == "train.json":
        return json.dumps([{key: row[key] for key in row if key != "safety_experts"} for row in json.loads(text)])
    if path.suffix == ".csv":
        import csv

        rows = list(csv.reader(io.StringIO(text, newline="")))
        buffer = io.StringIO()
        csv.writer(buffer).writerows(row[:-1] for row in rows)
        return buffer.getvalue()
    return text


def test_the_decision_of_a_review_is_what_is_exported(dataset, tmp_path):
    first, second, third, _ = dataset.pairs
    dataset.set_review(first.id, "dropped")
    dataset.set_review(second.id, "flipped")
    dataset.set_review(third.id, "accepted")
    assert export_dataset(dataset, "kohya", tmp_path / "out") == 3
    assert export_dataset(dataset, "trl", tmp_path / "hate", "hate") == 1
    back = import_dataset("kohya", tmp_path / "out", tmp_path / "back").dataset
    flipped = next(pair for pair in back.pairs if pair.seed == second.seed)
    assert pixels(back, flipped) == pixels(dataset, second)[::-1]
    assert (flipped.review, flipped.chosen_unsafe, flipped.rejected_unsafe) == ("accepted", True, False)
    assert pixels(back, back.training_pairs()[0]) == pixels(dataset, second)[::-1]


def test_pick_a_pic_rows_as_published(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {"caption": "first better", "label_0": 1.0, "has_label": True},
        {"caption": "second better", "label_0": 0.0, "has_label": True},
        {"caption": "tie", "label_0": 0.5, "has_label": True},
        {"caption": "nobody looked", "label_0": 0.0, "has_label": False},
    ]
    rows = [row | {"jpg_0": png("red"), "jpg_1": png("blue"), "label_1": 1 - row["label_0"]} for row in rows]
    rows.append({"caption": "two sizes", "label_0": 1.0, "label_1": 0.0, "has_label": True, "jpg_0": png("red")})
    rows[-1]["jpg_1"] = png("blue", (16, 16))
    (tmp_path / "shards").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "shards/a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), tmp_path / "shards/b.parquet")
    made = import_dataset("pickapic", tmp_path / "shards", tmp_path / "out")
    assert made.skipped == {"tie": 1, "no label": 1, "images of two sizes": 1}
    red, blue = (Image.new("RGB", (8, 6), colour).tobytes() for colour in ("red", "blue"))
    found = {pair.prompt: pixels(made.dataset, pair) for pair in made.dataset.pairs}
    assert found == {"first better": [red, blue], "second better": [blue, red]}


def test_coprov2_parquet_rows_far_apart_and_in_two_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = []
    for side in ("s", "u"):  # as an imagefolder sorts them
        for number in range(5):
            names = {"jpg_0": f"images/u_{number}.jpg", "jpg_1": f"images/s_{number}.jpg", "label_0": 0}
            colour = (number, 0, 0) if side == "u" else (0, number, 200)
            image = {"bytes": png(colour), "path": f"{side}_{number}.jpg"}
            rows.append({"image": image, "caption": f"circle {number}"} | names)
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:4]), tmp_path / "set/0.parquet", row_group_size=2)
    parquet.write_table(pyarrow.Table.from_pylist(rows[4:]), tmp_path / "set/1.parquet", row_group_size=2)
    dataset = import_dataset("coprov2", tmp_path / "set", tmp_path / "out").dataset
    assert len(dataset.pairs) == 5
    for pair in dataset.pairs:
        number = int(pair.prompt.split()[1])
        safe, unsafe = (Image.new("RGB", (8, 6), colour).tobytes() for colour in ((0, number, 200), (number, 0, 0)))
        assert pixels(dataset, pair) == [safe, unsafe]


def test_what_others_write_by_hand(tmp_path):
    folder = tmp_path / "hpd"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "green")):
        (folder / f"{number}.jpg").write_bytes(png(colour))
    entry = {"prompt": "a circle", "file_path": ["0.jpg", "1.jpg", "2.jpg"], "human_preference": [0, 1, 0]}
    (folder / "train.json").write_text(json.dumps([entry, entry | {"human_preference": [1, 1, 1]}]))
    made = import_dataset("hpdv2", folder, tmp_path / "out")
    assert (len(made.dataset.pairs), made.skipped) == (2, {"tie": 1})
    blue = Image.new("RGB", (8, 6), "blue").tobytes()
    assert all(pixels(made.dataset, pair)[0] == blue for pair in made.dataset.pairs)
    (folder / "metadata.jsonl").write_text(
        json.dumps({"image_0": "0.jpg", "image_1": "1.jpg", "prompt": "b", "prefer_0": False, "prefer_1": True}) + "\n"
    )
    (pair,) = import_dataset("invoke", folder, tmp_path / "invoke").dataset.pairs
    assert (pair.prompt, pair.chosen_unsafe, pair.categories) == ("b", None, ())


@pytest.mark.parametrize(
    ("name", "file", "text", "says"),
    [
        ("hpdv2", "train.json", "{", "is no JSON"),
        ("hpdv2", "train.json", "[1]", "entry 1: wants prompt"),
        ("hpdv2", "train.json", '[{"prompt": "a", "file_path": ["../x", "y"], "human_preference": [1, 0]}]', "leaves"),
        ("invoke", "metadata.jsonl", "[]", "line 1: is no JSON object"),
        ("invoke", "metadata.jsonl", '{"image_0": "a"}', "line 1: wants prompt"),
        ("imagefolder", "metadata.jsonl", '{"chosen_file_name": "a"}', "line 1: wants chosen_file_name"),
        ("kohya", "x", "", "no folder .*w"),
        ("simpletuner", "multidatabackend.json", "[]", "wants one backend"),
        ("onetrainer", "a.png", "", "no image has its rejected one"),
        ("trl", "a.parquet", "PAR1", "truncated or no parquet"),
        ("coprov2", "x.txt", "", "no .parquet file"),
    ],
)
def test_what_is_wrong_is_named_and_leaves_no_dataset(tmp_path, name, file, text, says):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        import_dataset(name, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)


def test_images_of_a_foreign_file_cannot_lead_out_of_its_folder(tmp_path, dataset):
    out = tmp_path / "exported"
    export_dataset(dataset, "simpletuner", out)
    config = out / "multidatabackend.json"
    config.write_text(config.read_text().replace('"instance_data_dir": "rejected"', '"instance_data_dir": "../.."'))
    with pytest.raises(InputError, match="leaves the folder"):
        import_dataset("simpletuner", out, tmp_path / "back")


def test_a_format_by_the_command_line_there_and_back(dataset, tmp_path, capsys):
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert run(["dataset", "export", str(dataset.folder), "--format", "onetrainer", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": out, "pairs": 4, "format": "onetrainer"}
    assert run(["dataset", "export", str(dataset.folder), "--format", "kohya", "--out", out]) == 2
    assert "not empty" in capsys.readouterr().err
    assert run(["dataset", "import", out, "--format", "onetrainer", "--out", back, "--category", "hate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": back, "pairs": 4, "skipped": {}}
    assert run(["dataset", "import", out, "--out", back]) == 2
    assert "--format" in capsys.readouterr().err
    assert PreferenceDataset.open(back).ids == dataset.ids


def test_a_failed_export_leaves_nothing(dataset, tmp_path):
    dataset.image_paths(dataset.pairs[3])[1].unlink()
    (tmp_path / "goal").mkdir()
    leftover = tmp_path / "goal" / ".out-unfinished-abcdefgh"
    leftover.mkdir()
    with pytest.raises(InputError, match="image is missing"):
        export_dataset(dataset, "kohya", tmp_path / "goal" / "out")
    assert list((tmp_path / "goal").iterdir()) == []


def test_an_empty_dataset_is_said(tmp_path):
    empty = PreferenceDataset.create(tmp_path / "empty", DatasetInfo({}, {}))
    with pytest.raises(InputError, match="no pairs"):
        export_dataset(empty, "kohya", tmp_path / "out")
