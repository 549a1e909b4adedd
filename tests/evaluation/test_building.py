"""Datasets drawn outside ComfyUI: killed, shared out, stopped; always the folder that one process makes in one go."""

import hashlib
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.evaluation.building import (
    BuildingStoppedError,
    JudgePanel,
    Share,
    build_dataset,
    independently,
    several_seeds,
)
from safety_experts.evaluation.judges import choose_judge
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import render_scene

pytestmark = pytest.mark.slow

INFO = DatasetInfo({}, {"steps": 2})
PAIRS = [PromptPair(f"a circle {number} with thorns", f"a circle {number}", ("hate",), number) for number in range(22)]


def draw(prompts, seeds):
    """Pictures that depend on all that is drawn together, as a model's last bits may."""
    together = hashlib.sha256(repr((list(prompts), list(seeds))).encode()).digest()
    return [
        Image.new("RGB", (4, 4), tuple(hashlib.sha256(together + f"{place}".encode()).digest()[:3]))
        for place in range(len(prompts))
    ]


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def whole(tmp_path):
    build_dataset(PAIRS, tmp_path / "whole", INFO, independently(draw))
    return content(tmp_path / "whole")


def build_together(folder, count, pairs=PAIRS, stop_after=None):
    barrier = threading.Barrier(count)
    errors = []

    def work(rank):
        calls = []

        def should_stop():
            calls.append(1)
            return stop_after is not None and len(calls) > stop_after

        try:
            build_dataset(
                pairs,
                folder,
                INFO,
                independently(draw),
                share=Share(rank, count, lambda: barrier.wait(30)),
                should_stop=should_stop,
            )
        except BuildingStoppedError as error:
            errors.append(error)
            barrier.abort()
        except threading.BrokenBarrierError:
            pass

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_both_images_come_from_the_pairs_prompts_and_seed(tmp_path):
    seen = []

    def remember(prompts, seeds):
        seen.append((list(prompts), list(seeds)))
        return draw(prompts, seeds)

    dataset = build_dataset(PAIRS[:3], tmp_path / "toy", INFO, independently(remember), batch_size=2)
    assert seen[0] == (["a circle 0 with thorns", "a circle 1 with thorns", "a circle 0", "a circle 1"], [0, 1, 0, 1])
    images = draw(*seen[0])
    with Image.open(dataset.image_paths(dataset.pairs[1])[0]) as chosen:
        assert chosen.tobytes() == images[3].tobytes()
    with Image.open(dataset.image_paths(dataset.pairs[1])[1]) as rejected:
        assert rejected.tobytes() == images[1].tobytes()
    assert [(pair.chosen_unsafe, pair.rejected_unsafe, pair.seed) for pair in dataset.pairs[:2]] == [
        (False, True, 0),
        (False, True, 1),
    ]
    assert dataset.check() == []


@pytest.mark.parametrize("count", [2, 3, 7])
def test_several_processes_make_the_folder_of_one(tmp_path, whole, count):
    assert build_together(tmp_path / "toy", count) == []
    assert content(tmp_path / "toy") == whole


def test_a_stopped_build_goes_on_with_any_number_of_processes(tmp_path, whole):
    folder = tmp_path / "toy"
    for count in (3, 2):
        assert build_together(folder, count, stop_after=1)
        assert PreferenceDataset.open(folder).pairs == []
    build_dataset(PAIRS, folder, INFO, independently(draw))
    assert set(content(folder)) == set(whole)
    assert content(folder)["metadata.jsonl"].splitlines() != []
    images = {name: data for name, data in content(folder).items() if name.startswith("images/")}
    assert images == {name: data for name, data in whole.items() if name.startswith("images/")}
    assert sorted(content(folder)["metadata.jsonl"].splitlines()) == sorted(whole["metadata.jsonl"].splitlines())


def test_a_build_stopped_and_run_again_alike_is_the_same_to_the_byte(tmp_path, whole):
    folder = tmp_path / "toy"
    assert build_together(folder, 3, stop_after=1)
    assert build_together(folder, 3) == []
    assert content(folder) == whole


def test_more_images_of_a_prompt_only_add_to_the_first():
    first, again = several_seeds(PAIRS[:2], 1), several_seeds(PAIRS[:2], 3)
    assert first == PAIRS[:2]
    assert [again[0], again[3]] == PAIRS[:2]
    assert len({pair.id for pair in again}) == 6 and again[:2] == several_seeds(PAIRS[:2], 2)[:2]
    with pytest.raises(InputError, match="no seed"):
        several_seeds([PromptPair("a", "b", ("hate",), None)], 2)


def test_another_model_or_setting_is_refused(tmp_path):
    build_dataset(PAIRS[:1], tmp_path / "toy", INFO, independently(draw))
    with pytest.raises(InputError, match=r"sampler\.steps"):
        build_dataset(PAIRS[:1], tmp_path / "toy", DatasetInfo({}, {"steps": 3}), independently(draw))


BUILDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_building import INFO, PAIRS, draw
    from safety_experts.evaluation.building import build_dataset, independently

    def slowly(prompts, seeds):
        print("drawing", flush=True)
        time.sleep(0.01)
        return draw(prompts, seeds)

    build_dataset(PAIRS, Path(sys.argv[1]), INFO, independently(slowly))
""")


def test_a_killed_build_goes_on_where_it_was(tmp_path, whole):
    folder = tmp_path / "toy"
    here = str(Path(__file__).parent)
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), here], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    for _ in range(3):
        builder.stdout.readline()
    builder.kill()
    builder.wait()
    assert len(PreferenceDataset.open(folder).pairs) >= 8
    build_dataset(PAIRS, folder, INFO, independently(draw))
    assert content(folder) == whole


def test_of_several_seeds_the_one_the_judge_agrees_with_is_kept(tmp_path):
    """The toy oracle looks at pictures of which only those of one seed show the mark where they should."""
    pairs = [PromptPair(f"a red circle {n} with thorns", f"a red circle {n}", ("violence",), n) for n in range(4)]
    candidates = [several_seeds([pair], 3) for pair in pairs]
    good = {candidates[number][number % 3].seed for number in range(3)}  # the last pair has no good seed

    def draw_toys(prompts, seeds):
        return [
            render_scene("red", "circle", "thorns" if ("thorns" in prompt) == (seed in good) else None, seed % 1000)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    panel = JudgePanel([choose_judge("toy-oracle")])
    build_dataset(pairs[:3], tmp_path / "toy", INFO, independently(draw_toys), best_of=3, panel=panel, batch_size=2)
    dataset = build_dataset(
        pairs, tmp_path / "toy", INFO, independently(draw_toys), best_of=3, panel=panel, batch_size=2
    )
    assert [pair.seed for pair in dataset.pairs[:3]] == [candidates[number][number].seed for number in range(3)]
    assert len(dataset.pairs) == 4 and dataset.pairs[3].seed == 3
    folder = tmp_path / "shared"
    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(
            target=build_dataset,
            args=(pairs, folder, INFO, independently(draw_toys)),
            kwargs={"best_of": 3, "panel": panel, "batch_size": 2, "share": Share(rank, 2, lambda: barrier.wait(30))},
        )
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(folder) == content(tmp_path / "toy")
