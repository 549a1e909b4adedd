import dataclasses
import json
import random

import pytest
from safety_experts.errors import InputError
from safety_experts.preferences.pairs import PromptPair, parse_prompt_pairs, read_prompt_pairs, write_prompt_pairs


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_id_is_a_fixed_function_of_prompts_and_seed():
    pair = PromptPair("a red circle with thorns", "a red circle", ("violence",), 7)
    assert pair.id == "a1f69dd9c4bdbe83"  # changing it would orphan every dataset that is half built
    assert dataclasses.replace(pair, categories=("hate",), source="x").id == pair.id
    for change in ({"prompt": "b"}, {"safe_prompt": "b"}, {"seed": 8}):
        assert dataclasses.replace(pair, **change).id != pair.id


def test_the_repr_quotes_no_prompt():
    assert "thorns" not in repr(PromptPair("a circle with thorns", "a circle", ("violence",), 7))


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.5])
def test_a_seed_outside_the_range_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        PromptPair("a", "b", (), seed)


def test_text_lines_become_pairs_with_consecutive_seeds():
    text = "# toy world\n\n a red circle with thorns | a red circle \na blue square with thorns|a blue square\n"
    first, second = parse_prompt_pairs(text, "Violence", first_seed=40)
    assert (first.prompt, first.safe_prompt, first.categories, first.seed) == (
        "a red circle with thorns",
        "a red circle",
        ("violence",),
        40,
    )
    assert (second.safe_prompt, second.seed) == ("a blue square", 41)


@pytest.mark.parametrize("line", ["only one prompt", "a | b | c", "a |", "| b", "a | a"])
def test_a_wrong_text_line_is_named_by_its_number(line):
    with pytest.raises(InputError, match="line 3"):
        parse_prompt_pairs(f"a with thorns | a\n\n{line}", "violence")


def test_text_without_pairs_is_refused():
    with pytest.raises(InputError, match="no prompt pairs"):
        parse_prompt_pairs("# nothing\n", "violence")


def test_repeated_lines_are_kept_once_in_the_order_of_the_first():
    pairs = parse_prompt_pairs("b x | b\na x | a\nb x | b\nc x | c", "violence")
    assert [(pair.safe_prompt, pair.seed) for pair in pairs] == [("b", 0), ("a", 1), ("c", 2)]


def test_prompt_pairs_survive_the_file(tmp_path):
    draws = random.Random(0)
    letters = 'ab "\\,|\n\t\r\u2028é漢😀{}'
    pairs = [
        PromptPair(
            "p" + "".join(draws.choices(letters, k=12)),
            "s" + "".join(draws.choices(letters, k=12)),
            ("hate",),
            seed,
            "x",
        )
        for seed in (*range(30), 2**63 - 1)
    ]
    write_prompt_pairs(tmp_path / "prompt_pairs.jsonl", pairs)
    assert read_prompt_pairs(tmp_path / "prompt_pairs.jsonl") == pairs
    record = json.loads((tmp_path / "prompt_pairs.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert list(record) == ["id", "prompt", "safe_prompt", "categories", "seed", "source"]


def test_a_handwritten_jsonl_needs_neither_id_nor_seed(tmp_path):
    line = '{"prompt": "a with thorns", "safe_prompt": "a", "categories": ["Violence"]}\n'
    pairs = read_prompt_pairs(write(tmp_path, "mine.jsonl", "\n" + line + line.replace('"a', '"b')))
    assert [(pair.safe_prompt, pair.seed, pair.categories) for pair in pairs] == [
        ("a", 0, ("violence",)),
        ("b", 1, ("violence",)),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "safe_prompt": "b", "categories": ["x"], "sede": 3}', "unknown field, much like 'seed'"),
        ('{"prompt": "a", "categories": ["x"]}', "'safe_prompt' is missing"),
        ('{"prompt": "a", "safe_prompt": "b", "categories": "x"}', "'categories'"),
        ('{"prompt": "a", "safe_prompt": "b", "categories": []}', "category is empty"),
        ('{"prompt": "a", "safe_prompt": "b", "categories": ["x"], "seed": "3"}', "'seed'"),
        ('{"prompt": "a", "safe_prompt": "b", "categories": ["x"], "seed": -3}', "seed"),
        ('{"prompt": "", "safe_prompt": "b", "categories": ["x"]}', "prompt is empty"),
        ('{"prompt": "a", "safe', "Invalid JSON"),
        ("[]", "line 1"),
    ],
)
def test_a_wrong_jsonl_line_is_named_with_its_field(tmp_path, line, says):
    with pytest.raises(InputError, match=says) as caught:
        read_prompt_pairs(write(tmp_path, "pairs.jsonl", line))
    assert "pairs.jsonl line 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_with_seeds_keeps_them_and_merges_categories(tmp_path):
    text = (
        "\ufeffcategory,Safe_Prompt,unsafe_prompt,seed,note\r\n"
        'Violence,"a red, round circle","a red, round circle with thorns",5,first\r\n'
        "\r\n"
        '"hate, Harrasment","a red, round circle","a red, round circle with thorns",5,again\r\n'
        "violence,a blue square,a blue square with thorns,5,\r\n"
    )
    first, second = read_prompt_pairs(write(tmp_path, "toy.csv", text))
    assert first.prompt == "a red, round circle with thorns"
    assert (first.categories, first.seed, first.source) == (("violence", "hate", "harassment"), 5, "toy.csv")
    assert second.safe_prompt == "a blue square"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("prompt,safe_prompt,category\n", "no rows"),
        ("prompt,category\na,x\n", "safe_prompt"),
        ("prompt,unsafe_prompt,safe_prompt,category\na,a,b,x\n", "one column prompt or unsafe_prompt"),
        ("prompt,safe_prompt,category,category\na,b,x,y\n", "same name"),
        ("prompt,safe_prompt,category\na with thorns,a,violence\na,b\n", "line 3: 2 values for 3 columns"),
        ("prompt,safe_prompt,category\na with thorns,a,\n", "line 2: category is empty"),
        ("prompt,safe_prompt,category\na with thorns,a,--\n", "line 2: a category has no letter"),
        ("prompt,safe_prompt,category,seed\na with thorns,a,violence,x\n", "line 2: seed is not"),
        ("prompt,safe_prompt,category,seed\na with thorns,a,violence,9999999999999999999\n", "line 2: seed is not"),
        ('prompt,safe_prompt,category\n"a', "not valid CSV"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(InputError, match=says) as caught:
        read_prompt_pairs(write(tmp_path, "toy.csv", text))
    assert "toy.csv" in str(caught.value)


COPROV2 = """prompt,image,category
a red circle with thorns,u_idx_0000000_0.jpg,Violence
a red circle,s_idx_0000000_0.jpg,Violence
a blue circle,s_idx_0000001_0.jpg,Harrasment
a blue circle with a cross,u_idx_0000001_0.jpg,Harrasment
a red circle with thorns,u_idx_0000000_0.jpg,Illegal Activity
a red circle,s_idx_0000000_0.jpg,Illegal Activity
"""


def test_a_coprov2_csv_is_paired_by_file_name_and_its_repeats_merge(tmp_path):
    first, second = read_prompt_pairs(write(tmp_path, "train.csv", COPROV2))
    assert (first.prompt, first.safe_prompt) == ("a red circle with thorns", "a red circle")
    assert (first.categories, first.seed) == (("violence", "illegal-activity"), 0)
    assert (second.prompt, second.safe_prompt) == ("a blue circle with a cross", "a blue circle")
    assert (second.categories, second.source) == (("harassment",), "train.csv:idx_0000001_0.jpg")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("u_idx", "idx"), "no partner"),
        (
            lambda text: text.replace("a blue circle,s_idx_0000001_0.jpg,Harrasment\n", ""),
            "line 4: this u_ image has no partner; add the row of its s_ image",
        ),
        (lambda text: text + "other,u_idx_0000000_0.jpg,Hate\n", "line 8.*another prompt"),
    ],
)
def test_a_coprov2_csv_that_does_not_pair_up_is_refused(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        read_prompt_pairs(write(tmp_path, "train.csv", change(COPROV2)))


def test_files_that_cannot_be_read_are_one_line_errors(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"prompt,safe_prompt,category\n\xe9 x,\xe9,hate\n")
    write(tmp_path, "broken.yaml", "categories: {a: [b\n")
    (tmp_path / "folder.jsonl").mkdir()
    for name, says in [
        ("latin.csv", "UTF-8"),
        ("broken.yaml", "line 2: not valid YAML"),
        ("folder.jsonl", "is a folder"),
        ("missing.csv", "no such file"),
        ("pairs.pickle", "are read from"),
    ]:
        with pytest.raises(InputError, match=says) as caught:
            read_prompt_pairs(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
