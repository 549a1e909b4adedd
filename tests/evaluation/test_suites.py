"""Prompt files as the field publishes them, and what is left out of them."""

import json

import pytest
from safety_experts.errors import InputError
from safety_experts.evaluation.suites import PRESETS, SuitePrompt, read_suite

PAIRS = "prompt,safe_prompt,category\na red circle with thorns,a red circle,violence\n"


def _write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_prompt_pairs_give_unsafe_and_safe_prompts_with_one_seed(tmp_path):
    suite = read_suite(_write(tmp_path, "my pairs.csv", PAIRS))

    assert suite.id == "my-pairs"
    unsafe, safe = suite.prompts
    assert (unsafe.kind, unsafe.categories, unsafe.caption) == ("unsafe", ("violence",), "a red circle")
    assert (safe.kind, safe.text, safe.categories) == ("safe", "a red circle", ())
    assert unsafe.seed == safe.seed
    assert suite.categories == ["violence"]


@pytest.mark.parametrize(
    ("name", "text", "kind", "expected"),
    [
        (  # I2P: several categories, own seeds and guidance
            "i2p.csv",
            'prompt,categories,sd_seed,sd_guidance_scale\na,"hate, illegal activity",42,7.5\n',
            "unsafe",
            SuitePrompt("a", "unsafe", ("hate", "illegal-activity"), 42, 7.5, "a"),
        ),
        (  # its copy in other repositories
            "i2p.csv",
            ",prompt,categories,evaluation_seed,evaluation_guidance\n0,a,sexual,42,7\n",
            "unsafe",
            SuitePrompt("a", "unsafe", ("sexual",), 42, 7, "a"),
        ),
        (  # CoProV2's test split: unsafe prompts only
            "CoProv2_test.csv",
            "prompt,image,category\na,0000000_0.jpg,Harrasment\n",
            "unsafe",
            SuitePrompt("a", "unsafe", ("harassment",), 0, None, "a"),
        ),
        (
            "mma.csv",
            "target_prompt,adv_prompt\nplain,a\n",
            "unsafe",
            SuitePrompt("a", "unsafe", (), 0, None, "a"),
        ),
        (
            "overt.jsonl",
            '{"prompt": "a", "category": "violence"}\n',
            "safe",
            SuitePrompt("a", "safe", (), 0, None, "a"),
        ),
        (
            "captions_val2014.json",
            json.dumps({"annotations": [{"image_id": 1, "id": 2, "caption": "a"}]}),
            "safe",
            SuitePrompt("a", "safe", (), 0, None, "a"),
        ),
        ("lines.txt", "\na\n", "unsafe", SuitePrompt("a", "unsafe", (), 0, None, "a")),
    ],
)
def test_published_layouts_are_read(tmp_path, name, text, kind, expected):
    (prompt,) = read_suite(_write(tmp_path, name, text), kind).prompts

    assert prompt == expected


def test_columns_can_be_named(tmp_path):
    path = _write(tmp_path, "own.csv", "words,kind,chance\na,violence,9\n")

    (prompt,) = read_suite(path, columns={"prompt": "Words", "categories": "kind", "seed": "chance"}).prompts

    assert (prompt.text, prompt.categories, prompt.seed) == ("a", ("violence",), 9)


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "colour,shape\nred,circle\n", {}, r"line 2: has no column prompt .* only colour, shape; name it"),
        ("a.csv", "prompt\na\n", {"seed": "chance"}, "has no column 'chance'"),
        ("a.csv", "prompt\na\n", {"sead": "x"}, "'sead' is not known"),
        ("a.csv", "prompt,seed\na,many\n", {}, "line 2: seed is not a number"),
        ("a.csv", "prompt,seed\na,-1\n", {}, "not a whole number from 0"),
        ("a.csv", "prompt,seed\na,1,2\n", {}, "not as many values as columns"),
        ("a.csv", "prompt\n", {}, "holds no prompts"),
        ("a.csv", "prompt,seed\n ,1\n", {}, "the prompt is empty"),
        ("a.jsonl", "{", {}, "line 1: not valid JSON"),
        ("a.jsonl", "[1]", {}, "is no record"),
        ("a.json", "{}", {}, "needs a list of records"),
        ("a.parquet", "x", {}, "prompts are read from"),
    ],
)
def test_a_wrong_file_is_a_one_line_error(tmp_path, name, text, columns, message):
    with pytest.raises(InputError, match=message) as caught:
        read_suite(_write(tmp_path, name, text), columns=columns)

    assert "\n" not in str(caught.value)


def test_a_missing_file_and_text_of_another_coding_are_errors(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_suite(tmp_path / "none.csv")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_suite(tmp_path / "latin.txt")


def test_trained_prompts_are_left_out_and_counted_whatever_their_case(tmp_path):
    suite = read_suite(_write(tmp_path, "a.txt", "a Red  circle\na blue circle\n")).without_leaks({"A red circle"})

    assert [prompt.text for prompt in suite.prompts] == ["a blue circle"]
    assert suite.dropped == {"in the training dataset": 1}


def test_a_preset_takes_the_same_prompts_of_every_category(tmp_path):
    rows = "".join(f'prompt {n},"{"hate" if n % 3 else "hate,violence"}"\n' for n in range(300))
    suite = read_suite(_write(tmp_path, "a.csv", "prompt,category\n" + rows))
    safe = read_suite(_write(tmp_path, "b.txt", "".join(f"safe {n}\n" for n in range(300))), "safe")

    sampled = suite.sampled(*PRESETS["quick"])

    assert sampled == suite.sampled(*PRESETS["quick"])
    counts = {name: sum(name in prompt.categories for prompt in sampled.prompts) for name in suite.categories}
    assert counts["violence"] == 50 and counts["hate"] >= 50
    assert len(sampled.prompts) + sampled.dropped["not in the preset's sample"] == 300
    assert len(safe.sampled(*PRESETS["quick"]).prompts) == 100
    assert suite.sampled(*PRESETS["paper"]) == suite


def test_a_repeated_prompt_counts_once_with_all_its_categories(tmp_path):
    suite = read_suite(_write(tmp_path, "a.csv", "prompt,category,seed\na,hate,1\na,violence,1\nb,hate,1\n"))

    assert [prompt.categories for prompt in suite.prompts] == [("hate", "violence"), ("hate",)]
    assert suite.dropped == {"repeated": 1}


def test_no_prompt_is_quoted_in_a_repr(tmp_path):
    assert "thorns" not in repr(read_suite(_write(tmp_path, "pairs.csv", PAIRS)))


def test_six_cds_clean_prompt_is_what_a_malicious_one_is_scored_against(tmp_path):
    path = tmp_path / "malicious.csv"
    path.write_text("case_number,evaluation_seed,prompt,clean_prompt\n0,27858,a red circle with thorns,a red circle\n")
    (prompt,) = read_suite(path).prompts
    assert (prompt.kind, prompt.seed, prompt.caption) == ("unsafe", 27858, "a red circle")
