"""Prompt pairs written by a language model: a real server, a tiny local model, and every kind of bad answer."""

import json
import re

import pytest
from openai_server import OpenAiServer
from safety_experts import endpoint
from safety_experts.commands import run
from safety_experts.endpoint import Endpoint, Request
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.preferences.local_model import LocalModel
from safety_experts.preferences.pairs import read_prompt_pairs
from safety_experts.preferences.unsafe_prompts import read_unsafe_prompts
from safety_experts.preferences.writing import Checks, write_pairs, write_safe_sides

CONCEPTS = {"violence": ["thorns", "spikes"], "hate": ["stripes"]}
PLACES = ("in the garden at noon", "beside an old wooden table", "under a pale winter sky")
SHAPES = ("circle", "square", "diamond")
SUBJECTS = [f"{colour} {shape} {place}" for colour in ("red", "blue") for shape in SHAPES for place in PLACES]


def answer(*pairs: tuple[str, str]) -> str:
    return json.dumps({"pairs": [{"prompt": prompt, "safe_prompt": safe} for prompt, safe in pairs]})


class Author:
    """Writes pairs of the toy world, as many as asked, new ones each time."""

    def __init__(self):
        self.count = 0

    def __call__(self, body: dict) -> str:
        text = body["messages"][0]["content"]
        if prompt := re.search(r"^Prompt: (.*)$", text, re.MULTILINE):
            return json.dumps({"safe_prompt": prompt[1].replace(" with thorns", "")})
        concept, number = re.search(r"picture of it: (\w+)", text)[1], int(re.search(r"Write (\d+) pairs", text)[1])
        pairs = []
        for _ in range(number):
            subject = SUBJECTS[self.count % len(SUBJECTS)]
            self.count += 1
            pairs.append((f"a {subject} with {concept}", f"a {subject}"))
        return answer(*pairs)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT_SECONDS", 0.01)
    started = OpenAiServer(Author())
    yield started
    started.close()


@pytest.fixture
def model(server):
    return Endpoint(server.url, "toy", retries=1)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prompt_pairs.jsonl"


def test_every_concept_gets_its_pairs_and_they_are_ours_to_draw(model, out):
    written = write_pairs(model, CONCEPTS, out, number=6)

    pairs = read_prompt_pairs(out)
    assert pairs == written.pairs and len(pairs) == 18 and not written.missing
    assert [pair.seed for pair in pairs] == list(range(18))
    assert sum(pair.concept == "thorns" and pair.categories == ("violence",) for pair in pairs) == 6
    assert all(pair.concept in pair.prompt and pair.concept not in pair.safe_prompt for pair in pairs)
    assert {pair.source for pair in pairs} == {"written by toy"}


def test_a_stopped_run_goes_on_and_nothing_is_asked_twice(server, model, out):
    stops = iter([False, False, True])
    write_pairs(model, CONCEPTS, out, number=6, should_stop=lambda: next(stops))
    first = read_prompt_pairs(out)
    assert 0 < len(first) < 18

    written = write_pairs(model, CONCEPTS, out, number=6)
    asked = len(server.requests)
    again = write_pairs(model, CONCEPTS, out, number=6)

    assert written.pairs[: len(first)] == first and len(written.pairs) == 18
    assert again.pairs == written.pairs and len(server.requests) == asked


def test_an_outage_keeps_what_was_written(server, model, out):
    server.answers = [Author(), (404, "gone"), (404, "gone")]

    with pytest.raises(SafetyExpertsError, match="no such model"):
        write_pairs(model, {"violence": ["thorns"]}, out, number=10)
    assert 0 < len(read_prompt_pairs(out)) <= 5


@pytest.mark.parametrize(
    ("prompt", "safe", "problem"),
    [
        ("a red circle with thorns", "", "empty or too long"),
        ("a red circle with thorns", "a red circle " * 60, "empty or too long"),
        ("a red circle\nwith thorns", "a red circle", "not one line of text"),
        ("a red circle with thorns", "A red circle, with thorns!", "both sides say the same"),
        ("a red circle with thorns", "some blue diamonds", "the sides have too little in common"),
        ("a red circle with thorns", "a red circle without thorns", "the safe side names the concept"),
        ("a red circle with many many thorns", "a red circle", "more than 75 tokens"),
    ],
)
def test_a_pair_that_cannot_teach_is_left_out_and_counted(server, model, out, prompt, safe, problem):
    server.answers = [answer((prompt, safe))] * 3
    checks = Checks(count_tokens=lambda text: 76 if "many" in text else 10)

    written = write_pairs(model, {"violence": ["thorns"]}, out, number=1, checks=checks)

    assert dict(written.refused) == {problem: 3}
    assert written.missing == {"violence: thorns": 1} and not out.exists()


def test_near_repeats_are_left_out_within_a_category_only(server, model, out):
    pair = ("a large red circle in the garden with thorns", "a large red circle in the garden")
    near = ("a large red circle in a garden with thorns", "a large red circle in a garden")
    server.answers = [answer(pair, near, pair), answer(pair)]

    written = write_pairs(model, {"violence": ["thorns"]}, out, number=2)
    assert written.refused["nearly the same as an earlier one"] == 2  # `near`, and `pair` when it came again
    assert len({frozenset(found.prompt.split()) for found in written.pairs}) == len(written.pairs) == 2

    server.answers = [answer((pair[0].replace("thorns", "stripes"), pair[1]))]
    assert len(write_pairs(model, {"hate": ["stripes"]}, out, number=1).pairs) == 3


@pytest.mark.parametrize("bad", ["no", "[]", '{"pairs": []}', '{"pairs": [{"prompt": 1, "safe_prompt": "a"}]}', "[[[["])
def test_an_answer_that_is_none_is_asked_for_again(server, model, out, bad):
    server.answers = [bad] * 3  # every try of the first request

    written = write_pairs(model, {"violence": ["thorns"]}, out, number=2)

    assert len(written.pairs) == 2
    assert written.refused["an answer that was no JSON of pairs"] == 1


def test_unsafe_prompts_get_a_safe_side(server, model, tmp_path, out):
    listed = tmp_path / "prompts.txt"
    listed.write_text("# mine\na red circle with thorns\n\na blue square with thorns\na red circle with thorns\n")
    prompts = read_unsafe_prompts(listed, "violence")
    written = write_safe_sides(model, prompts, out)
    asked = len(server.requests)
    write_safe_sides(model, prompts, out)

    assert [(pair.prompt, pair.safe_prompt) for pair in written.pairs] == [
        ("a red circle with thorns", "a red circle"),
        ("a blue square with thorns", "a blue square"),
    ]
    assert len(server.requests) == asked == 2


def test_i2ps_columns_are_read(tmp_path):
    path = tmp_path / "i2p.csv"
    path.write_text('prompt,categories,hard\na red circle with thorns,"violence, illegal activity",0\n')

    assert read_unsafe_prompts(path) == [("a red circle with thorns", ("violence", "illegal-activity"))]
    path.write_text("text\na\n")
    with pytest.raises(InputError, match="no column `prompt`"):
        read_unsafe_prompts(path)
    (tmp_path / "a.txt").write_text("a red circle with thorns\n")
    with pytest.raises(InputError, match="has no category"):
        read_unsafe_prompts(tmp_path / "a.txt")


def test_the_request_is_a_file_of_ones_own(server, model, tmp_path, out, capsys):
    template = tmp_path / "mine.txt"
    template.write_text("picture of it: {concept}. Write {number} pairs of {category} {{in my way}}")
    (tmp_path / "concepts.yaml").write_text("violence: [thorns]\n")
    given = ["--concepts", tmp_path / "concepts.yaml", "--template", template, "--url", server.url, "--model", "toy"]

    assert run(["dataset", "write", *map(str, given), "--number", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs": 2, "refused": {}, "missing": 0}
    sent = server.requests[0][1]["messages"][0]["content"]
    assert sent == "picture of it: thorns. Write 2 pairs of violence {in my way}"
    for text, message in (("{concept}", "{number} is missing"), ("{concept} {number} {x}", "{x} is none of")):
        template.write_text(text)
        assert run(["dataset", "write", *map(str, given), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a", "write `category:"), ("violence: thorns", "expected a list of texts"), ("violence: [1]", "list of texts")],
)
def test_wrong_concepts_are_named(tmp_path, capsys, content, message):
    (tmp_path / "concepts.yaml").write_text(content)
    arguments = ["--concepts", str(tmp_path / "concepts.yaml"), "--model", "m", "--out", str(tmp_path / "out")]

    assert run(["dataset", "write", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a language model of transformers: a few random weights and a letter a token."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("language") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = {chr(number): number for number in range(32, 127)} | {"<unk>": 0, "</s>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_local_model_is_asked_without_a_server(tiny_model, tmp_path, out):
    """It answers, always the same for a seed, and nothing it says gets past the checks."""
    model = LocalModel(tiny_model)
    messages = [{"role": "user", "content": "a red circle"}]

    first, again, other = (
        model.complete(Request(messages, {}, max_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    written = write_pairs(model, {"violence": ["thorns"]}, out, number=1, retries=0)

    assert first == again != other
    assert written.missing == {"violence: thorns": 1} and written.refused.total() == 3
    with pytest.raises(InputError, match="no model folder"):
        LocalModel(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_command_asks_a_local_model_as_it_asks_the_same_one_behind_a_server(tiny_model, tmp_path, capsys):
    (tmp_path / "concepts.yaml").write_text("violence: [thorns]\n")
    model = LocalModel(tiny_model)
    asked = []

    def serve(body) -> str:
        asked.append(Request(body["messages"], {}, body["max_tokens"], body["temperature"], body["seed"]))
        return model.complete(asked[-1])

    server = OpenAiServer(serve)
    words = ["dataset", "write", "--concepts", str(tmp_path / "concepts.yaml"), "--number", "1", "--retries", "0"]
    try:
        for place in (["--local", str(tiny_model), "--device", "cpu"], ["--url", server.url, "--model", "tiny"]):
            assert run([*words, *place, "--out", str(tmp_path / "out"), "--json"]) == 0
    finally:
        server.close()

    local, served = map(json.loads, capsys.readouterr().out.splitlines())
    assert local == served == {"pairs": 0, "refused": {"an answer that was no JSON of pairs": 3}, "missing": 1}
    assert len(asked) == 3 and "thorns" in asked[0].messages[0]["content"]
    assert run([*words, "--local", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
