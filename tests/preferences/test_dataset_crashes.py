import errno
import os
import subprocess
import sys
import textwrap

import pytest
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.preferences.dataset import PreferenceDataset

pytestmark = pytest.mark.slow

BUILDER = textwrap.dedent("""
    import sys
    from PIL import Image
    from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
    from safety_experts.preferences.pairs import PromptPair

    folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}))
    print("ready", flush=True)
    sys.stdin.readline()
    for index in range(first, last):
        pair = PromptPair(f"a circle {index} with thorns", f"a circle {index}", ("violence",), index)
        if pair.id not in dataset.ids:
            chosen, rejected = (Image.new("RGB", (4, 4), (index % 256, 0, blue)) for blue in (0, 1))
            dataset.add(pair, chosen, rejected)
            print(index, flush=True)
""")


def start_builder(folder, first, last):
    arguments = [sys.executable, "-c", BUILDER, str(folder), str(first), str(last)]
    builder = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder.parent)
    assert builder.stdout.readline() == "ready\n"
    return builder


def let_run(builder):
    builder.stdin.write("\n")
    builder.stdin.close()


def files_of(dataset):
    return sorted(path.name for path in (dataset.folder / "images").iterdir())


def images_of(dataset):
    return sorted(path.name for pair in dataset.pairs for path in dataset.image_paths(pair))


@pytest.mark.parametrize("kept_bytes", [1, 40, -2])
def test_a_torn_last_line_is_removed_and_its_pair_added_again(dataset, make_pair, draw, kept_bytes):
    metadata = dataset.folder / "metadata.jsonl"
    whole = metadata.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    metadata.write_bytes(whole[:start] + whole[start:][:kept_bytes])
    opened = PreferenceDataset.open(dataset.folder)
    assert [pair.id for pair in opened.pairs] == [pair.id for pair in dataset.pairs[:3]]
    assert metadata.read_bytes() == whole[:start] + whole[start:][:kept_bytes], "reading wrote"
    opened.add(make_pair(3, "hate"), *draw(3))
    assert metadata.read_bytes() == whole
    assert opened.check() == []


def test_a_last_line_that_only_lacks_its_line_break_is_kept(dataset, make_pair, draw):
    metadata = dataset.folder / "metadata.jsonl"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[:-1])
    opened = PreferenceDataset.open(dataset.folder)
    assert opened.pairs == dataset.pairs
    assert metadata.read_bytes() == whole[:-1], "reading wrote"
    assert dataset.check() == []
    opened.add(make_pair(9), *draw(9))
    assert metadata.read_bytes().startswith(whole)
    assert PreferenceDataset.open(dataset.folder).pairs == opened.pairs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((b'"review": null', b'"review": "drop"'), r"line 4: field 'review'"),
        ((b'"review": null', b'"reviews": null'), r"line 4: unknown field, much like 'review'"),
    ],
)
def test_a_wrong_last_line_without_its_line_break_is_an_error_not_a_loss(dataset, change, says):
    metadata = dataset.folder / "metadata.jsonl"
    head, last = metadata.read_bytes()[:-1].rsplit(b"\n", 1)
    wrong = head + b"\n" + last.replace(*change)
    metadata.write_bytes(wrong)
    for read in (PreferenceDataset.open, lambda folder: PreferenceDataset.create(folder, dataset.info)):
        with pytest.raises(InputError, match=says):
            read(dataset.folder)
    assert metadata.read_bytes() == wrong
    assert any("line 4" in problem for problem in dataset.check())


def test_zeros_left_by_a_power_cut_are_removed(dataset):
    with open(dataset.folder / "metadata.jsonl", "ab") as file:
        file.write(bytes(100))
    assert PreferenceDataset.create(dataset.folder, dataset.info).pairs == dataset.pairs
    assert dataset.check() == []


def test_a_broken_line_in_the_middle_is_an_error_not_a_loss(dataset):
    metadata = dataset.folder / "metadata.jsonl"
    lines = metadata.read_bytes().splitlines(keepends=True)
    metadata.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(InputError, match="line 2"):
        PreferenceDataset.open(dataset.folder)
    assert len(metadata.read_bytes().splitlines()) == 3


def test_images_without_a_line_are_reported_and_taken_up_by_the_next_build(dataset, make_pair, draw):
    metadata = dataset.folder / "metadata.jsonl"
    lines = metadata.read_bytes().splitlines(keepends=True)
    metadata.write_bytes(b"".join(lines[:3]))
    opened = PreferenceDataset.open(dataset.folder)
    assert ["belongs to no pair" in problem for problem in opened.check()] == [True, True]
    opened.add(make_pair(3, "hate"), *draw(3))
    assert opened.check() == []


def test_a_line_without_its_image_is_reported(dataset):
    path = dataset.image_paths(dataset.pairs[1])[1]
    path.unlink()
    opened = PreferenceDataset.open(dataset.folder)
    assert [f"{path}: the image is missing" in problem for problem in opened.check()] == [True]


def test_a_pair_that_is_there_is_returned_and_stays_as_it_is(dataset, make_pair, draw):
    before = dataset.fingerprint()
    assert dataset.add(make_pair(0), *draw(99)) == dataset.pairs[0]
    assert (len(dataset.pairs), dataset.fingerprint()) == (4, before)


def test_a_full_disk_while_writing_an_image_leaves_the_dataset_as_it_was(dataset, make_pair, draw, monkeypatch):
    files, before, replace = files_of(dataset), dataset.fingerprint(), os.replace
    calls = []

    def replace_until_full(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_full)
    with pytest.raises(SafetyExpertsError, match="disk full") as caught:
        dataset.add(make_pair(9), *draw(9))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert (files_of(dataset), dataset.fingerprint(), dataset.check()) == (files, before, [])
    dataset.add(make_pair(9), *draw(9))
    assert PreferenceDataset.open(dataset.folder).pairs == dataset.pairs


def test_a_line_that_no_longer_fits_is_taken_back(dataset, make_pair, draw):
    resource = pytest.importorskip("resource")
    metadata = dataset.folder / "metadata.jsonl"
    files, before = files_of(dataset), metadata.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system lets files grow to this size and no further, so the line is really cut after 20 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(SafetyExpertsError, match=r"cannot write .*: File too large"):
            dataset.add(make_pair(9), *draw(9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (metadata.read_bytes(), files_of(dataset), len(dataset.ids)) == (before, files, 4)
    dataset.add(make_pair(9), *draw(9))
    assert PreferenceDataset.open(dataset.folder).pairs == dataset.pairs


def test_an_interrupt_while_writing_leaves_the_dataset_as_it_was(dataset, make_pair, draw, monkeypatch):
    files, before = files_of(dataset), (dataset.folder / "metadata.jsonl").read_bytes()

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.add(make_pair(9), *draw(9))
    monkeypatch.undo()
    assert (files_of(dataset), (dataset.folder / "metadata.jsonl").read_bytes()) == (files, before)


def test_a_killed_build_is_sound_and_continues_without_duplicates(tmp_path):
    folder = tmp_path / "toy"
    builder = start_builder(folder, 0, 100_000)
    let_run(builder)
    for _ in range(20):
        builder.stdout.readline()
    builder.kill()
    builder.wait()
    done = len(PreferenceDataset.open(folder).pairs)
    assert 20 <= done < 100_000

    again = start_builder(folder, 0, done + 5)
    let_run(again)
    assert again.stdout.read().splitlines() == [str(index) for index in range(done, done + 5)]
    assert again.wait() == 0
    dataset = PreferenceDataset.open(folder)
    assert [pair.seed for pair in dataset.pairs] == list(range(done + 5))
    assert files_of(dataset) == images_of(dataset)
    assert dataset.check() == []


def test_two_processes_build_one_dataset_without_duplicates(tmp_path):
    folder = tmp_path / "toy"
    builders = [start_builder(folder, 0, 40), start_builder(folder, 20, 60)]
    for builder in builders:
        let_run(builder)
    for builder in builders:
        builder.stdout.read()
        assert builder.wait() == 0
    dataset = PreferenceDataset.open(folder)
    assert sorted(pair.seed for pair in dataset.pairs) == list(range(60))
    assert dataset.check() == []


def test_two_open_datasets_see_each_others_pairs_when_they_add(dataset, make_pair, draw):
    other = PreferenceDataset.open(dataset.folder)
    other.add(make_pair(10), *draw(10))
    dataset.add(make_pair(11), *draw(11))
    other.add(make_pair(11), *draw(99))
    assert other.pairs == dataset.pairs == PreferenceDataset.open(dataset.folder).pairs
