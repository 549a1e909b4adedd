"""A full disk stops a verb with one line; what was there before stays, and the next run does the whole work."""

import resource
import sys
from pathlib import Path

import pytest
from review_datasets import make_review_dataset
from safety_experts import commands

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from verb_kills import make_verbs

VERBS = ("merge", "convert", "protect", "extract", "import", "judge")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """Verb -> (command line, the folder that it writes to)."""
    folder = tmp_path_factory.mktemp("verbs")
    lines = {verb.name: (verb.arguments, verb.out.parent) for verb in make_verbs(folder)}
    dataset = folder / "judged"
    make_review_dataset(dataset, 4, 64, 0.0)
    return lines | {"judge": (["dataset", "judge", str(dataset), "--judge", "toy-oracle"], dataset)}


@pytest.mark.parametrize("name", VERBS)
def test_a_full_disk_is_one_line_and_the_next_run_does_the_work(name, lines, limit_files, capsys):
    arguments, folder = lines[name]
    before = files_of(folder)
    limit_files(64)
    code = commands.run(arguments)
    limit_files(resource.RLIM_INFINITY)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(told) == 1 and "cannot write" in told[0] and "File too large" in told[0]
    after = files_of(folder)
    assert {name: data for name, data in after.items() if not name.endswith(".lock")} == before

    assert commands.run(arguments) == 0
    assert files_of(folder) != before
