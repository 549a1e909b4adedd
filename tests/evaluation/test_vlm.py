"""The vision-language judge against a real HTTP server that speaks the OpenAI API: well, badly, slowly, not at all."""

import base64
import io
import json

import pytest
from openai_server import OpenAiServer
from PIL import Image
from safety_experts import endpoint
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.evaluation.judges import choose_judge
from safety_experts.toy.oracle import read_image
from safety_experts.toy.world import MARKS, render_scene

CATEGORY_OF = {mark: category for category, mark in MARKS.items()}


def _picture(body) -> Image.Image:
    address = body["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def _see(body) -> str:
    mark = read_image(_picture(body)).mark
    named = [CATEGORY_OF[mark]] if mark else []
    return json.dumps({"unsafe": bool(mark), "categories": named, "confidence": 0.9})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT_SECONDS", 0.01)
    server = OpenAiServer(_see)
    yield server
    server.close()


@pytest.fixture
def choose(server, tmp_path):
    return lambda **values: choose_judge(
        "vlm", {"url": server.url, "model": "toy", "cache": tmp_path / "cache", **values}
    )


def test_a_verdict_is_what_the_model_saw_in_that_picture(server, choose):
    marks = [None, "thorns", "stripes", None, "ring"]
    choice = choose(parallel=3)

    scores = choice.load().read([render_scene("red", "circle", mark, 7) for mark in marks], ["a secret prompt"] * 5)

    assert [choice.decide(score) for score in scores] == [bool(mark) for mark in marks]
    assert scores[1]["violence"] == 1.0 and scores[1]["hate"] == 0.0 and scores[1]["confidence"] == 0.9
    assert choice.decide(scores[1], ["violence"], rule="own-category") is True
    assert choice.decide(scores[1], ["hate"], rule="own-category") is False
    assert choice.decide(scores[1], ["of-ones-own"], rule="own-category") is None
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert all(body["temperature"] == 0 and body["model"] == "toy" for _, body in server.requests)
    assert "secret" not in json.dumps([body for _, body in server.requests])


def test_nothing_is_asked_before_reading_and_nothing_twice(server, choose):
    image = render_scene("red", "circle", "thorns", 7)
    judge = choose().load()
    assert server.requests == []

    first = judge.read([image], [""])
    second = choose().load().read([image], [""])

    assert first == second
    assert len(server.requests) == 1
    choose(model="another").load().read([image], [""])
    choose(policy={"violence": "the image shows thorns"}).load().read([image], [""])
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "bad",
    [
        "I cannot help with that.",
        "",
        None,
        "{",
        json.dumps({"unsafe": "yes", "categories": [], "confidence": 1}),
        json.dumps({"unsafe": True, "categories": [], "confidence": 1}),
        json.dumps({"unsafe": False, "categories": ["violence"], "confidence": 1}),
        json.dumps({"unsafe": True, "categories": ["weather"], "confidence": 1}),
        json.dumps({"unsafe": True, "categories": ["?"], "confidence": 1}),
        json.dumps({"unsafe": False, "categories": [], "confidence": 7}),
        json.dumps([1, 2]),
    ],
)
def test_an_invalid_answer_is_asked_for_again_and_then_is_no_verdict(server, choose, bad):
    image, choice = render_scene("red", "circle", "thorns", 7), choose(retries=1)
    server.answers = [bad, bad]
    (scores,) = choice.load().read([image], [""])
    assert scores == {} and choice.decide(scores) is None
    assert len({body["seed"] for _, body in server.requests}) == 2

    server.answers = [bad]
    assert choice.decide(choice.load().read([image], [""])[0]) is True


def test_json_in_a_fence_is_read(server, choose):
    server.answers = ["Sure!\n```json\n" + json.dumps({"unsafe": False, "categories": [], "confidence": 0.4}) + "\n```"]
    choice = choose()
    (scores,) = choice.load().read([render_scene("red", "circle", None, 7)], [""])

    assert choice.decide(scores) is False
    assert choice.decide(scores, rule="sure") is None


def test_a_server_that_knows_no_schema_is_asked_without(server, choose):
    server.answers = [lambda body: (400, "no") if "response_format" in body else _see(body)]
    choice = choose()

    assert choice.decide(choice.load().read([render_scene("red", "circle", "thorns", 7)], [""])[0]) is True
    assert "response_format" not in server.requests[1][1]


def test_a_server_in_trouble_is_waited_for(server, choose):
    server.answers = [(503, "busy"), (429, "slower")]
    choice = choose(retries=2)

    assert choice.decide(choice.load().read([render_scene("red", "circle", "thorns", 7)], [""])[0]) is True


@pytest.mark.parametrize(("status", "message"), [(404, "no such model"), (401, "key is missing"), (503, "HTTP 503")])
def test_a_server_that_refuses_ends_the_work_with_a_reason(server, choose, status, message):
    server.answers = [(status, "no")] * 9

    with pytest.raises(SafetyExpertsError, match=message):
        choose(retries=1).load().read([render_scene("red", "circle", None, 7)], [""])


def test_a_redirect_is_not_followed(server, choose):
    other = OpenAiServer(_see)
    server.answers = [(302, other.url + "/chat/completions")] * 9
    try:
        with pytest.raises(SafetyExpertsError):
            choose(retries=0).load().read([render_scene("red", "circle", None, 7)], [""])
        assert other.requests == []
    finally:
        other.close()


def test_nobody_there_is_said_in_one_line(server, choose):
    server.close()

    with pytest.raises(SafetyExpertsError, match="start the server") as error:
        choose(retries=0, url="http://127.0.0.1:9/v1").load().read([render_scene("red", "circle", None, 7)], [""])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["http://example.org/v1", "http://10.0.0.7:8000/v1", "http://127.0.0.1.example.org/v1"])
def test_pictures_stay_on_this_machine_unless_allowed(choose, url):
    with pytest.raises(InputError, match="not on this machine"):
        choose(url=url).load()
    choose(url=url, allow_remote=True).load()


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:11434", "http://", "http://name:word@127.0.0.1/v1"])
def test_an_address_is_an_address(choose, url):
    with pytest.raises(InputError, match="write an address such as"):
        choose(url=url).load()


def test_large_pictures_are_made_small_and_the_key_comes_from_the_environment(server, choose, monkeypatch):
    monkeypatch.setenv(endpoint.API_KEY_VARIABLE, "abc")
    choose(longest_side_px=96).load().read([Image.new("RGB", (400, 200))], [""])

    assert _picture(server.requests[0][1]).size == (96, 48)
    assert server.headers[0]["Authorization"] == "Bearer abc"


def test_a_torn_cache_file_is_asked_for_again(server, choose, tmp_path):
    image = render_scene("red", "circle", "thorns", 7)
    judge = choose().load()
    judge.read([image], [""])
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text('{"unsafe": tr')

    judge.read([image], [""])

    assert len(server.requests) == 2
