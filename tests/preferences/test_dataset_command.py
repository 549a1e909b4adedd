import json
import shutil

import pytest
from PIL import Image
from safety_experts.commands import run
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.preferences.pairs import read_prompt_pairs

COPROV2 = """prompt,image,category
a red circle with thorns,u_idx_0000000_0.jpg,Violence
a red circle,s_idx_0000000_0.jpg,Violence
a blue circle with a cross,u_idx_0000001_0.jpg,Hate
a blue circle,s_idx_0000001_0.jpg,Hate
a red circle with thorns,u_idx_0000000_0.jpg,Shocking
a red circle,s_idx_0000000_0.jpg,Shocking
"""


@pytest.fixture
def coprov2(tmp_path):
    """A CoProV2 CSV of two pairs and the folder of its four images."""
    (tmp_path / "train.csv").write_text(COPROV2)
    images = tmp_path / "pictures"
    images.mkdir()
    for index in range(2):
        Image.new("RGB", (16, 16), (200, 0, 0)).save(images / f"u_idx_{index:07}_0.jpg")
        Image.new("RGB", (16, 16), (0, 200, 0)).save(images / f"s_idx_{index:07}_0.jpg")
    return tmp_path / "train.csv", images


def test_importing_a_csv_without_images_writes_prompt_pairs(coprov2, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["dataset", "import", str(coprov2[0]), "--out", str(out), "--json"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(out / "prompt_pairs.jsonl"),
        "prompt_pairs": 2,
        "categories": ["hate", "shocking", "violence"],
    }
    assert read_prompt_pairs(out / "prompt_pairs.jsonl") == read_prompt_pairs(coprov2[0])
    assert run(command) == 0


def test_an_import_does_not_overwrite_other_prompt_pairs(coprov2, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("prompt,safe_prompt,category\na with thorns,a,violence\n")
    assert run(["dataset", "import", str(coprov2[0]), "--out", str(tmp_path)]) == 0
    before = (tmp_path / "prompt_pairs.jsonl").read_bytes()
    assert run(["dataset", "import", str(tmp_path / "other.csv"), "--out", str(tmp_path)]) == 2
    assert "holds other prompt pairs" in capsys.readouterr().err
    assert (tmp_path / "prompt_pairs.jsonl").read_bytes() == before


def test_importing_images_makes_a_sound_dataset_and_continues_a_killed_one(coprov2, tmp_path, capsys):
    out = tmp_path / "toy"
    command = ["dataset", "import", str(coprov2[0]), "--images", str(coprov2[1]), "--out", str(out)]
    shutil.move(coprov2[1] / "u_idx_0000001_0.jpg", tmp_path)
    assert run(command) == 2
    assert "u_idx_0000001_0.jpg: the image is missing" in capsys.readouterr().err
    shutil.move(tmp_path / "u_idx_0000001_0.jpg", coprov2[1])
    assert run(command) == 0
    dataset = PreferenceDataset.open(out)
    first, second = dataset.pairs
    assert (first.prompt, first.safe_prompt) == ("a red circle with thorns", "a red circle")
    assert (first.categories, second.categories) == (("violence", "shocking"), ("hate",))
    assert (first.chosen_unsafe, first.rejected_unsafe) == (False, True)
    chosen, rejected = (Image.open(path).getpixel((0, 0)) for path in dataset.image_paths(first))
    assert chosen[1] > 150 > rejected[1]
    assert run(["dataset", "check", str(out)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_image_names_cannot_leave_the_images_folder(coprov2, tmp_path, capsys):
    csv = coprov2[0]
    csv.write_text(COPROV2.replace("u_idx_0000000_0.jpg", "../u_idx_0000000_0.jpg"))
    assert run(["dataset", "import", str(csv), "--images", str(coprov2[1]), "--out", str(tmp_path / "toy")]) == 2
    assert "an image name leaves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "jsonl"], "--format jsonl reads .jsonl"),
        (["--images", "nowhere"], "no images folder"),
    ],
)
def test_wrong_import_options_exit_with_two_and_one_line(coprov2, tmp_path, capsys, arguments, says):
    assert run(["dataset", "import", str(coprov2[0]), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_need_a_coprov2_csv(tmp_path, capsys):
    for name, text in (("a.csv", "prompt,safe_prompt,category\na x,a,hate\n"), ("a.jsonl", "{}")):
        (tmp_path / name).write_text(text)
        arguments = [str(tmp_path / name), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
        assert run(["dataset", "import", *arguments]) == 2
        assert "CoProV2's layout" in capsys.readouterr().err


def test_check_lists_problems_and_exits_with_one(dataset, capsys):
    dataset.image_paths(dataset.pairs[0])[0].unlink()
    assert run(["dataset", "check", str(dataset.folder), "--json"]) == 1
    printed = capsys.readouterr()
    (problem,) = json.loads(printed.out)["problems"]
    assert "the image is missing" in problem
    assert printed.err == f"error: {dataset.folder}: 1 problem(s); see the list above\n"
    assert run(["dataset", "check", str(dataset.folder / "nowhere")]) == 2


def test_stats_count_what_is_there(dataset, make_pair, draw, capsys):
    dataset.add(make_pair(9), *draw(9), review="dropped", chosen_unsafe=None)
    assert run(["dataset", "stats", str(dataset.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pairs": 5,
        "training": 4,
        "categories": {"violence": 4, "hate": 1},
        "review": {"none": 4, "dropped": 1},
        "chosen_unsafe": {"false": 4, "unknown": 1},
        "rejected_unsafe": {"true": 5},
        "sizes_px": {"4×3": 5},
    }
    assert run(["dataset", "stats", str(dataset.folder)]) == 0
    assert "categories: violence 4, hate 1" in capsys.readouterr().out
