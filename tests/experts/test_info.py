"""Experts of format version 1, written before metadata were typed, say today what they said then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.experts.expert_file import load_expert, open_expert, save_expert
from safety_experts.experts.info import Converted, ExpertInfo, Extracted, Merged, Protected, Trained, read_info
from safety_experts.experts.reproduction import reproduce_merge

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "version_1.json").read_text())  # what version 1 itself read in the files
KINDS = {
    "trained": Trained,
    "trained_with": Trained,
    "merged": Merged,
    "merged_ties": Merged,
    "merged_scaled": Merged,
    "protected": Protected,
    "extracted": Extracted,
    "converted": Converted,
}


def flat(info: ExpertInfo) -> dict:
    """Return an info as version 1 wrote it: everything side by side, what is empty left out."""

    def add(origin) -> None:
        if origin is None:
            return
        values = origin.model_dump(mode="json", exclude_none=True, exclude={"before", "kind", "finished"})
        if isinstance(origin, Extracted | Converted):
            names = ("tuned", "base", "rank", "energy")
            found[origin.kind] = {name: values.pop(name) for name in names if name in values}
        if isinstance(origin, Protected):
            found["method"] = "protect"
            found["parameters"] = {name: values.pop(name) for name in ("space", "strength")}
            add(origin.before)
        if isinstance(origin, Merged):
            found["parameters"] = {}
        found.update({key: value for key, value in values.items() if value not in ({}, []) or key == "num_left_out"})

    found = info.model_dump(mode="json", exclude_none=True, exclude={"origin"})
    found = {key: value for key, value in found.items() if value not in ({}, [])}
    add(info.origin)
    return found | {"format_version": 1}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_version_1_reads_unchanged_and_can_be_written_again(name, tmp_path):
    expert = load_expert(GOLDEN / f"{name}.safetensors")
    then = FACTS[name]
    assert isinstance(expert.info.origin, KINDS[name])
    assert flat(expert.info) == then["info"]
    assert (expert.file_sha256, expert.tensors_sha256()) == (then["sha256"], then["tensors_sha256"])
    assert open_expert(GOLDEN / f"{name}.safetensors").info == expert.info

    save_expert(expert, tmp_path / "again.safetensors")
    again = load_expert(tmp_path / "again.safetensors")
    assert again.info == expert.info and again.tensors_sha256() == expert.tensors_sha256()


@pytest.mark.parametrize("name", ["merged", "merged_ties", "merged_scaled", "protected"])
def test_a_merge_of_version_1_is_reproduced(name):
    statistics = GOLDEN / "statistics.safetensors" if name == "merged_scaled" else None
    assert reproduce_merge(GOLDEN / f"{name}.safetensors", (), statistics).relative_error < 1e-4


def test_inspect_names_objective_recipe_and_step(tmp_path, capsys):
    assert run(["inspect", str(GOLDEN / "trained.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "objective: sigmoid\n" in text and "step: 3, from 4 pairs\n" in text and "recipe: of its own, seed 0" in text
    expert = load_expert(GOLDEN / "trained.safetensors")
    trained = expert.info.trained.model_copy(
        update={"recipe": expert.info.trained.recipe | {"name": "toy", "objective": "hinge"}, "finished": False}
    )
    changed = replace(expert, info=expert.info.model_copy(update={"origin": trained}))
    save_expert(changed, tmp_path / "new.safetensors")
    assert run(["inspect", str(tmp_path / "new.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "objective: hinge\n" in text and "recipe: toy, seed 0" in text
    assert "step: 3 (unfinished: the training was stopped there), from 4 pairs\n" in text
    assert run(["inspect", str(tmp_path / "new.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"]["finished"] is False


@pytest.mark.parametrize("name", KINDS)
def test_inspect_prints_every_origin(name, capsys):
    assert run(["inspect", str(GOLDEN / f"{name}.safetensors")]) == 0
    kind = {"Trained": "objective", "Merged": "merged by"}.get(KINDS[name].__name__, KINDS[name].__name__.lower())
    assert f"\n{kind}: " in capsys.readouterr().out


V1 = {"format_version": 1}
MERGED = {"kind": "merged", "method": "linear", "parents": [{"name": "a", "tensors_sha256": "ab"}]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (V1 | {"categories": None}, "field 'categories'"),
        (V1 | {"categories": "hate"}, "field 'categories'"),
        (V1 | {"categories": ["a\x1b[2J"]}, "field 'categories.0'"),
        (V1 | {"rank_blocks": [None]}, "field 'rank_blocks.0'"),
        (V1 | {"rank_blocks": [{"name": "a", "rank": -1}]}, "field 'rank_blocks.0.rank'"),
        (V1 | {"rank_blocks": [{"name": "a", "rank": 1, "layers": {"x": -2}}]}, "field 'rank_blocks.0.layers.…'"),
        (V1 | {"method": "linear", "parents": [3]}, "field 'origin.merged.parents.0'"),
        (V1 | {"method": "linear", "parents": []}, "field 'origin.merged.parents'"),
        (V1 | {"method": 3}, "origin.merged"),
        (V1 | {"recipe": []}, "field 'origin.trained.recipe'"),
        (V1 | {"recipe": {}, "step": 1.5}, "field 'origin.trained.step'"),
        (V1 | {"base_checkpoint": {"name": ["x"]}}, "field 'base_checkpoint.name'"),
        (V1 | {"category_strengths": {"hate": "much"}}, "field 'category_strengths.…'"),
        (V1 | {"method": "protect", "parameters": {"space": "inner", "strength": 1}}, "origin.protected"),
        ({"format_version": 2, "origin": {"kind": "stolen secret"}}, "a kind that is not known"),
        ({"format_version": 2, "mood": 1}, "field '…' is not known"),
        ({"format_version": 2, "origin": {**MERGED, "retained_energy": {"x": 2.0}}}, "retained_energy.…"),
        ({"format_version": "2"}, "expert format unknown"),
        ([], "no JSON object"),
    ],
)
def test_metadata_of_a_wrong_type_are_one_line_that_names_the_field(values, words):
    with pytest.raises(InputError) as caught:
        read_info({"safety_experts": json.dumps(values)}, "e.safetensors")
    message = str(caught.value)
    assert message.startswith("e.safetensors: ") and words in message and "\n" not in message
    assert "secret" not in message and "\x1b" not in message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format_version": 1, "recipe": ' + '{"a":' * 500 + "1" + "}" * 501,
        '{"format_version": 1, "seed": ' + "9" * 5000 + "}",
        '{"format_version": 1, "recipe": {"beta": NaN}, "seed": Infinity}',
        "\ud800",
    ],
)
def test_bombs_of_json_are_one_line(text):
    with pytest.raises(InputError) as caught:
        read_info({"safety_experts": text}, "e.safetensors")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_one_checkpoint_is_one_whatever_it_is_called():
    first = CheckpointId(name="a.safetensors", sha256="ab", family="sd15")
    assert first.is_same_model(CheckpointId(name="b.safetensors", sha256="ab"))
    assert not first.is_same_model(CheckpointId(name="a.safetensors", sha256="cd"))
    assert not first.is_same_model(first.model_copy(update={"patches": ("ef",)}))
    assert first.model_dump() == {"name": "a.safetensors", "sha256": "ab", "family": "sd15"}
    assert CheckpointId().model_dump() == {}
