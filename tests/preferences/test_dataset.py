import dataclasses
import json
import shutil

import pytest
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.preferences.dataset import DatasetInfo, ImageToImage, PreferenceDataset
from safety_experts.preferences.pairs import write_prompt_pairs

FIELDS = ["id", "prompt", "safe_prompt", "categories", "chosen_file_name", "rejected_file_name"]
FIELDS += ["chosen_unsafe", "rejected_unsafe", "seed", "width_px", "height_px", "concept", "scores", "review", "source"]


def rewrite(dataset, number, **changes):
    """Change fields of the record on line `number` (from 0), as a person with an editor would."""
    path = dataset.folder / "metadata.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_an_added_pair_is_stored_with_exactly_the_fields_of_the_format(dataset):
    records = [json.loads(line) for line in (dataset.folder / "metadata.jsonl").read_text().splitlines()]
    first = records[0]
    assert list(first) == FIELDS
    assert first["chosen_file_name"] == f"images/{first['id']}-chosen.png"
    assert first["rejected_file_name"] == f"images/{first['id']}-rejected.png"
    assert (first["width_px"], first["height_px"], first["categories"]) == (4, 3, ["violence"])
    assert (first["chosen_unsafe"], first["rejected_unsafe"], first["review"], first["scores"]) == (
        False,
        True,
        None,
        {},
    )
    stored = json.loads((dataset.folder / "dataset.json").read_text())
    asked = dataclasses.asdict(dataset.info) | {"base_checkpoint": dataset.info.base_checkpoint.model_dump()}
    assert asked.pop("image_to_image") is None
    assert stored == {"format_version": 1} | asked


def test_an_opened_dataset_equals_the_one_that_was_written(dataset):
    opened = PreferenceDataset.open(dataset.folder)
    assert (opened.info, opened.pairs, opened.ids) == (dataset.info, dataset.pairs, dataset.ids)
    assert opened.ids == {pair.id for pair in opened.pairs}


def test_images_are_stored_without_loss(dataset, draw):
    for index, pair in enumerate(dataset.pairs):
        for path, drawn in zip(dataset.image_paths(pair), draw(index), strict=True):
            with Image.open(path) as stored:
                assert (stored.mode, stored.tobytes()) == ("RGB", drawn.tobytes())


def test_scores_flags_and_review_are_kept(dataset, make_pair, draw):
    options = {"chosen_unsafe": None, "rejected_unsafe": False, "scores": {"judge": 1}, "review": "accepted"}
    added = dataset.add(make_pair(9), *draw(9), **options)
    assert PreferenceDataset.open(dataset.folder).pairs[-1] == added
    assert {name: getattr(added, name) for name in options} == options


def test_hf_datasets_reads_the_folder(dataset, make_pair, draw, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset.add(make_pair(9), *draw(9), scores={"judge": 0.5})
    write_prompt_pairs(dataset.folder / "prompt_pairs.jsonl", [make_pair(9)])
    table = datasets.load_dataset("imagefolder", data_dir=str(dataset.folder), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    names = [name.removesuffix("_file_name") for name in FIELDS]
    assert table.column_names == names
    assert table["id"][:] == [pair.id for pair in dataset.pairs]
    assert table[2]["chosen"].tobytes() == draw(2)[0].tobytes()
    assert table[2]["rejected"].tobytes() == draw(2)[1].tobytes()


def test_create_opens_what_is_there_when_the_settings_agree(dataset):
    other_name = dataset.info.base_checkpoint.model_copy(update={"name": "other.safetensors"})
    renamed = dataclasses.replace(dataset.info, base_checkpoint=other_name)
    again = PreferenceDataset.create(dataset.folder, dataclasses.replace(renamed, prompt_source="elsewhere"))
    assert again.ids == dataset.ids
    assert again.info == dataset.info


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_checkpoint": {"sha256": "cd" * 32}}, "base_checkpoint.sha256"),
        ({"sampler": {"sampler": "euler", "steps": 30, "cfg": 7.5}}, "sampler.steps is 20 in the dataset and 30 here"),
        ({"sampler": {"sampler": "euler", "steps": 20, "cfg": 7.5, "eta": 1}}, "sampler.eta is None"),
        ({"sampler": {"sampler": "euler", "steps": 20}}, "sampler.cfg is 7.5"),
    ],
)
def test_create_with_other_settings_names_the_field(dataset, change, says):
    with pytest.raises(InputError, match=says) as caught:
        PreferenceDataset.create(dataset.folder, dataclasses.replace(dataset.info, **change))
    assert "another dataset name" in str(caught.value)


def test_tuples_in_the_sampler_settings_are_no_difference(tmp_path):
    info = DatasetInfo({}, {"size_px": (64, 64)})
    PreferenceDataset.create(tmp_path / "a", info)
    PreferenceDataset.create(tmp_path / "a", info)


def test_a_folder_with_other_things_is_neither_opened_nor_built_in(tmp_path, info):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no dataset\.json"):
        PreferenceDataset.open(tmp_path)
    with pytest.raises(InputError, match="not empty"):
        PreferenceDataset.create(tmp_path, info)
    with pytest.raises(InputError, match="is a file"):
        PreferenceDataset.create(tmp_path / "notes.txt", info)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_and_an_empty_folder_are_told_apart(tmp_path, make_pair, info):
    with pytest.raises(InputError, match="no dataset folder"):
        PreferenceDataset.open(tmp_path / "missing")
    write_prompt_pairs(tmp_path / "prompt_pairs.jsonl", [make_pair(0)])
    with pytest.raises(InputError, match="no preference dataset yet"):
        PreferenceDataset.open(tmp_path)
    assert PreferenceDataset.create(tmp_path, info).pairs == []


def test_an_unknown_version_or_field_of_dataset_json_is_refused(dataset):
    path = dataset.folder / "dataset.json"
    stored = json.loads(path.read_text())
    for change, says in (
        ({"format_version": 2}, "format_version is 2"),
        ({"colour": 1}, "unknown field .number 6 of the record"),
        ({"sampler": []}, "'sampler'"),
    ):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(InputError, match=says) as caught:
            PreferenceDataset.open(dataset.folder)
        assert str(path) in str(caught.value)
    path.write_text("")
    with pytest.raises(InputError, match="Invalid JSON"):
        PreferenceDataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "unknown field .number 16"),
        ({"width_px": 0}, "'width_px'"),
        ({"width_px": "64"}, "'width_px'"),
        ({"review": "good"}, "'review'"),
        ({"chosen_unsafe": 1}, "'chosen_unsafe'"),
        ({"scores": {"judge": "high"}}, "field 'scores'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"seed": -1}, "seed is not"),
        ({"chosen_file_name": "../../etc/x.png"}, "'chosen_file_name'.*leaves the dataset folder"),
        ({"rejected_file_name": "dataset.json"}, "'rejected_file_name' names a file of the dataset's own"),
        ({"rejected_file_name": ".cache/x.png"}, "'rejected_file_name' names a file of the dataset's own"),
        ({"rejected_file_name": "/etc/x.png"}, "'rejected_file_name'.*leaves"),
        ({"rejected_file_name": "C:x.png"}, "'rejected_file_name'.*leaves"),
        ({"rejected_file_name": "..\\x.png"}, "'rejected_file_name'.*leaves"),
    ],
)
def test_a_wrong_record_is_named_by_line_and_field(dataset, changes, says):
    rewrite(dataset, 2, **changes)
    with pytest.raises(InputError, match=f"metadata.jsonl line 3: .*{says}") as caught:
        PreferenceDataset.open(dataset.folder)
    assert "\n" not in str(caught.value)
    assert "with thorns" not in str(caught.value)


def test_a_missing_field_is_named(dataset):
    path = dataset.folder / "metadata.jsonl"
    path.write_text(path.read_text().replace('"seed": 1, ', ""))
    with pytest.raises(InputError, match="line 2: field 'seed' is missing"):
        PreferenceDataset.open(dataset.folder)


def test_a_link_out_of_the_folder_is_refused(dataset, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (4, 3)).save(outside)
    path = dataset.image_paths(dataset.pairs[0])[0]
    path.unlink()
    try:
        path.symlink_to(outside)
    except OSError:
        pytest.skip("this system makes no links")
    with pytest.raises(InputError, match="leaves the folder"):
        dataset.image_paths(dataset.pairs[0])
    assert any("leaves the folder" in problem for problem in dataset.check())


def test_images_of_two_sizes_are_refused(dataset, make_pair):
    with pytest.raises(InputError, match="chosen is 4×4 px and rejected is 8×4 px"):
        dataset.add(make_pair(9), Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4)))


def test_training_pairs_leave_out_dropped_and_swap_flipped(dataset, make_pair, draw):
    rewrite(dataset, 0, review="dropped")
    rewrite(dataset, 1, review="flipped", rejected_unsafe=None)
    opened = PreferenceDataset.open(dataset.folder)
    flipped, kept, hate = opened.training_pairs()
    stored = opened.pairs[1]
    assert (flipped.chosen_file_name, flipped.rejected_file_name) == (
        stored.rejected_file_name,
        stored.chosen_file_name,
    )
    assert (flipped.chosen_unsafe, flipped.rejected_unsafe) == (None, False)
    assert (kept, hate) == (opened.pairs[2], opened.pairs[3])
    assert flipped.swapped() == stored


def test_training_pairs_of_a_category_take_any_spelling(dataset):
    assert [pair.categories for pair in dataset.training_pairs("Violent")] == [("violence",)] * 3


def test_no_pairs_left_names_the_categories_there_are(dataset, tmp_path, info):
    with pytest.raises(InputError, match=r"'sexual'.*it has hate \(1\), violence \(3\)"):
        dataset.training_pairs("sexual content")
    with pytest.raises(InputError, match="no pairs to train on"):
        PreferenceDataset.create(tmp_path / "empty", info).training_pairs("hate")


def test_the_fingerprint_depends_on_content_only(dataset, tmp_path):
    shutil.copytree(dataset.folder, tmp_path / "copy")
    assert PreferenceDataset.open(tmp_path / "copy").fingerprint() == dataset.fingerprint()


def test_the_fingerprint_notices_images_records_and_settings(dataset, draw):
    seen = {dataset.fingerprint()}
    draw(77)[0].save(dataset.image_paths(dataset.pairs[0])[0])
    seen.add(dataset.fingerprint())
    rewrite(dataset, 1, review="flipped")
    seen.add(PreferenceDataset.open(dataset.folder).fingerprint())
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"steps": 20', '"steps": 21'))
    seen.add(PreferenceDataset.open(dataset.folder).fingerprint())
    assert len(seen) == 4
    dataset.image_paths(dataset.pairs[0])[0].unlink()
    with pytest.raises(InputError, match="no such file"):
        dataset.fingerprint()


def test_a_sound_dataset_has_no_problems(dataset):
    assert dataset.check() == []


def test_check_reports_every_problem_on_its_own_line(dataset, draw):
    paths = [dataset.image_paths(pair) for pair in dataset.pairs]
    paths[0][0].unlink()
    paths[0][1].write_bytes(paths[0][1].read_bytes()[:40])
    Image.new("RGB", (8, 8)).save(paths[1][1])
    shutil.copy(*paths[2])
    (dataset.folder / "images/stray.png").write_bytes(b"")
    metadata = dataset.folder / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    extra = [lines[3], json.dumps(json.loads(lines[3]) | {"id": "x", "colour": 1}), "{}", '{"id": "torn']
    metadata.write_text("\n".join(lines + extra))
    expected = [
        ("metadata.jsonl line 8", "half written"),
        (paths[0][0].name, "missing"),
        (paths[0][1].name, "not a whole PNG"),
        (paths[1][1].name, "is 8×8 px"),
        (paths[2][0].name, "shows the same"),
        ("metadata.jsonl line 5", "stands on line 4 too"),
        ("metadata.jsonl line 6", "unknown field (number 16"),
        ("metadata.jsonl line 7", "is missing"),
        ("stray.png", "belongs to no pair"),
    ]
    problems = dataset.check()
    assert len(problems) == len(expected)
    for name, says in expected:
        assert sum(name in problem and says in problem for problem in problems) == 1, (name, says)
    assert not any("\n" in problem for problem in problems)


def test_a_picture_that_is_no_png_is_a_problem_whatever_its_name(dataset):
    path = dataset.image_paths(dataset.pairs[0])[0]
    Image.new("RGB", (4, 3)).save(path, format="BMP")
    assert [str(path) in problem and "not a whole PNG" in problem for problem in dataset.check()] == [True]


def test_reprs_are_short_and_quote_no_prompt(dataset):
    assert repr(dataset) == f"PreferenceDataset({str(dataset.folder)!r}, 4 pairs)"
    assert "thorns" not in repr(dataset.pairs)


def test_how_the_chosen_images_follow_from_the_rejected_ones_is_recorded_and_older_files_open(tmp_path):
    plain, drawn = (DatasetInfo({}, {"steps": 4}, image_to_image=how) for how in (None, ImageToImage(0.75, True)))
    assert "image_to_image" not in plain.to_json()  # fingerprints of older datasets stay
    PreferenceDataset.create(tmp_path / "old", plain)
    PreferenceDataset.create(tmp_path / "new", drawn)

    assert PreferenceDataset.open(tmp_path / "old").info == plain
    assert PreferenceDataset.open(tmp_path / "new").info == drawn
    assert PreferenceDataset.create(tmp_path / "new", drawn).info == drawn
    for other in (plain, DatasetInfo({}, {"steps": 4}, image_to_image=ImageToImage(0.5, True))):
        with pytest.raises(
            InputError, match=r"starts from the rejected one with denoise 0\.75 and the unsafe prompt neg"
        ):
            PreferenceDataset.create(tmp_path / "new", other)


@pytest.mark.parametrize(
    "how", ['{"denoise": 1.0}', '{"denoise": 0.5, "strength": 1}', "0.5", '{"denoise": NaN}', "{}"]
)
def test_a_wrong_way_of_following_is_refused_naming_the_field(tmp_path, how):
    file = PreferenceDataset.create(tmp_path / "toy", DatasetInfo({}, {})).folder / "dataset.json"
    file.write_text(file.read_text().rstrip().removesuffix("}") + f', "image_to_image": {how}}}')
    with pytest.raises(InputError, match=r"dataset\.json: .*(image_to_image|denoise|field)"):
        PreferenceDataset.open(tmp_path / "toy")
