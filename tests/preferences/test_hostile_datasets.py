"""Datasets made by strangers: nothing outside the folder is touched, nothing hangs, nothing of the text is quoted."""

import json
import logging
import os
import sys

import pytest
from PIL import Image
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.plain_yaml import load_yaml
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.preferences.pairs import read_prompt_pairs
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.training.tensor_store import TensorStore

MARKER = "zyxwvut"

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="making links needs rights there")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="pipes and rights are POSIX's")


def state_of(folder):
    """Every file under a folder: its bytes and time of change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]


@needs_links
@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json", ".lock", "images", ".cache", "prompt_pairs.jsonl"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_linked_file_or_folder_is_refused_by_every_verb_and_nothing_outside_changes(
    dataset, make_pair, draw, tmp_path, name, dangling, capsys
):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".x.png").write_bytes(b"mine")
    target = outside / "x"
    here = dataset.folder / name
    if here.is_dir():
        here.rename(outside / "images")
        target = outside / "images" if not dangling else outside / "nowhere"
        if target.exists():
            (target / ".y.png").write_bytes(b"mine")
    elif not dangling:
        target.write_bytes(here.read_bytes()[:-1] if here.exists() else b"no line break at the end")
    here.unlink(missing_ok=True) if not here.is_dir() else None
    here.symlink_to(target)
    before = state_of(outside)
    for work in (
        lambda: PreferenceDataset.open(dataset.folder),
        lambda: PreferenceDataset.create(dataset.folder, dataset.info),
        lambda: dataset.add(make_pair(9), *draw(9)),
        lambda: dataset.set_review(dataset.pairs[0].id, "dropped"),
        lambda: dataset.check(),
    ):
        with pytest.raises(InputError, match="is a link"):
            work()
    for verb in ("stats", "check"):
        assert run(["dataset", verb, str(dataset.folder)]) == 2
        assert "is a link" in capsys.readouterr().err
    assert state_of(outside) == before and not (outside / "nowhere").exists()


@needs_links
def test_a_linked_cache_folder_or_shard_is_refused_before_it_is_read_or_removed(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"no safetensors")
    cache = tmp_path / ".cache" / "key"
    cache.mkdir(parents=True)
    (cache / "latents-00000.safetensors").symlink_to(outside)
    (tmp_path / "linked").symlink_to(cache, target_is_directory=True)
    for folder in (cache, tmp_path / "linked", tmp_path / "linked" / "deeper"):
        with pytest.raises(InputError, match="is a link"):
            TensorStore(folder, "latents")
    assert outside.read_bytes() == b"no safetensors"


def test_reading_changes_no_byte_and_no_time(dataset, capsys):
    metadata = dataset.folder / "metadata.jsonl"
    metadata.write_bytes(metadata.read_bytes()[:-9])
    before = state_of(dataset.folder)
    PreferenceDataset.open(dataset.folder).fingerprint()
    for verb in ("stats", "check"):
        run(["dataset", verb, str(dataset.folder)])
    assert state_of(dataset.folder) == before


@needs_posix
@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json", "image"])
def test_a_pipe_does_not_hang(dataset, name):
    path = dataset.image_paths(dataset.pairs[0])[0] if name == "image" else dataset.folder / name
    path.unlink()
    os.mkfifo(path)
    if name != "image":
        with pytest.raises(InputError, match=r"not an ordinary file|no preference dataset"):
            PreferenceDataset.open(dataset.folder)
        return
    with pytest.raises(InputError, match="not an ordinary file"):
        dataset.fingerprint()
    assert any("not an ordinary file" in problem for problem in dataset.check())


NAMES = {
    "nul": "a\0b",
    "long": "x" * 300,
    "loop": "loop",
    "file": "file/x",
}


@needs_links
@pytest.mark.parametrize("kind", NAMES)
def test_names_that_cannot_be_are_one_line_and_exit_two(tmp_path, kind, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,safe_prompt,category\na with thorns,a,violence\n")
    name = str(tmp_path / NAMES[kind])
    for arguments in (
        ["stats", name],
        ["check", name],
        ["import", name + ".csv", "--out", str(tmp_path / "out")],
        ["import", name + ".csv", "--images", str(tmp_path), "--out", str(tmp_path / "out")],
        ["import", str(csv), "--images", name, "--out", str(tmp_path / "out")],
        ["import", str(csv), "--out", name],
    ):
        assert run(["dataset", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_are_said(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("prompt,safe_prompt,category\né with thorns,é,violence\n".encode(encoding))
    with pytest.raises(InputError, match=r"a\.csv"):
        read_prompt_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "a: 2024-13-45",
        "a: !!int x",
        "[" * 3000,
        "a: \ud800",
        "1:" * 20000 + "1",
        "0x" + "f" * 5000,
        "=",
        "!!binary x",
        "!!python/object:os.x {}",
        "a: " + "x" * 300_000,
    ],
)
def test_every_fault_of_a_yaml_text_is_one_line_without_the_text(text):
    with pytest.raises(InputError, match=r"^f\.yaml") as caught:
        load_yaml(text, "f.yaml")
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"pairs_per_category": 10**12},
        {"lists": {f"l{number}": ["a", "b"] for number in range(40)}},
        {"categories": {"hate": ["x" * 1000]}, "lists": {"l0": [f"{number}" for number in range(150_000)]}},
    ],
)
def test_a_few_bytes_of_taxonomy_cannot_fill_the_memory(change):
    template = " ".join(["{concept}", *(f"{{{name}}}" for name in change.get("lists", {}))])
    data = {"categories": {"hate": ["x"]}, "templates": [{"prompt": template, "safe_prompt": "a"}]}
    with pytest.raises(InputError, match="more than 200000"):
        expand_taxonomy(data | change)


def mistakes(folder):
    """Ordinary and hostile mistakes, each with the marker in every text: (file, text)."""
    record = {"prompt": f"{MARKER} a", "safe_prompt": f"{MARKER} b", "categories": [MARKER], "source": MARKER}
    taxonomy = {
        "categories": {MARKER: [MARKER]},
        "lists": {f"{MARKER}list": [MARKER]},
        "templates": [{"prompt": f"{MARKER} {{concept}}", "safe_prompt": MARKER}],
    }
    yield "no_header.csv", f"{MARKER} one,{MARKER},{MARKER}\n{MARKER} two,{MARKER},{MARKER}\n"
    yield "short.csv", f"prompt,safe_prompt,category\n{MARKER},{MARKER}\n"
    yield "quote.csv", f'prompt,safe_prompt,category\n"{MARKER}"{MARKER},b,c\n'
    yield "seed.csv", f"prompt,safe_prompt,category,seed\n{MARKER},b,c,{MARKER}\n"
    yield "same.csv", f"prompt,safe_prompt,category\n{MARKER},{MARKER},{MARKER}\n"
    yield "twice.csv", f"{MARKER},{MARKER}\na,b\n"
    yield "coprov2.csv", f"prompt,image,category\n{MARKER},{MARKER}.png,{MARKER}\n"
    yield "partner.csv", f"prompt,image,category\n{MARKER},u_{MARKER}.png,{MARKER}\n"
    yield "redone.csv", f"prompt,image,category\n{MARKER},u_{MARKER}.png,a\n{MARKER} 2,u_{MARKER}.png,a\n"
    yield "json.jsonl", f'{{"prompt": "{MARKER}'
    for number, change in enumerate(
        ({MARKER: MARKER}, {"prompt": [MARKER]}, {"seed": MARKER}, {"categories": MARKER}, {"prompt": " "})
    ):
        yield f"record{number}.jsonl", json.dumps(record | change)
    for number, change in enumerate(
        (
            {MARKER: MARKER},
            {"categories": MARKER},
            {"categories": {MARKER: [[MARKER]]}},
            {"lists": {MARKER: MARKER}},
            {"lists": {MARKER: [{MARKER: MARKER}]}},
            {"pairs_per_category": MARKER},
            {"templates": [MARKER]},
            {"templates": [{"prompt": f"{MARKER} {{{MARKER}}} {{concept}}", "safe_prompt": MARKER}]},
            {"templates": [{"prompt": f"{MARKER} {{concept:{MARKER}}}", "safe_prompt": MARKER}]},
            {"templates": [{"prompt": f"{MARKER} {{concept", "safe_prompt": MARKER}]},
            {"templates": [{"prompt": MARKER, "safe_prompt": MARKER}]},
        )
    ):
        yield f"taxonomy{number}.yaml", json.dumps(taxonomy | change)
    yield "broken.yaml", f"categories: {{{MARKER}: [{MARKER}\n"
    yield "alias.yaml", f"categories: &{MARKER} {{a: [b]}}\nlists: *{MARKER}\n"


def test_no_error_and_no_log_quotes_what_the_user_wrote(tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    count = 0
    for name, text in mistakes(tmp_path):
        (tmp_path / name).write_text(text)
        assert run(["dataset", "import", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2, name
        printed = capsys.readouterr()
        assert MARKER not in printed.err + printed.out + caplog.text, name
        assert printed.err.count("\n") == 1
        count += 1
    assert count >= 25


@pytest.mark.parametrize(
    "change",
    [
        {MARKER: 1},
        {"review": MARKER},
        {"seed": MARKER},
        {"scores": {MARKER: MARKER}},
        {"categories": [[MARKER]]},
        {"chosen_file_name": f"../{MARKER}.png"},
        {"prompt": None},
    ],
)
def test_no_error_of_a_dataset_quotes_its_texts(dataset, change, capsys):
    metadata = dataset.folder / "metadata.jsonl"
    texts = {"prompt": MARKER, "safe_prompt": MARKER, "source": MARKER, "concept": MARKER}
    lines = metadata.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | texts | change)
    metadata.write_text("\n".join(lines) + "\n")
    for verb in ("stats", "check"):
        assert run(["dataset", verb, str(dataset.folder)]) in (1, 2)
        printed = capsys.readouterr()
        assert MARKER not in printed.err + printed.out
        assert "line 2" in printed.err + printed.out


def test_the_difference_of_two_settings_does_not_quote_a_prompt(dataset):
    import dataclasses

    info = dataclasses.replace(dataset.info, sampler=dataset.info.sampler | {"negative_prompt": MARKER})
    with pytest.raises(InputError, match=r"sampler\.negative_prompt") as caught:
        PreferenceDataset.create(dataset.folder, info)
    assert MARKER not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"1" * 5000,
        b'{"id": ' + b"1" * 5000 + b"}",
        b"\xff\xfe",
        b'{"id": "\\ud800"}',
        b"null",
        b"[]",
        b'{"a": NaN}',
    ],
)
def test_lines_that_are_no_record_are_an_error_that_names_the_line(dataset, line):
    with open(dataset.folder / "metadata.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"metadata\.jsonl line 5") as caught:
        PreferenceDataset.open(dataset.folder)
    assert len(str(caught.value)) < 400


def test_an_image_bomb_is_refused(dataset):
    path = dataset.image_paths(dataset.pairs[0])[0]
    Image.new("1", (20_000, 20_000)).save(path)  # 400 megapixels in 50 kB
    assert any("not a whole PNG" in problem for problem in dataset.check())
