"""The review page's routes: what they answer, and that nobody gets anything else out of them or through them."""

import asyncio
import hashlib
import http.client
import io
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from aiohttp import web
from PIL import Image
from review_datasets import ReviewCommand, make_review_dataset, reviews_on_disk
from safety_experts.commands import run
from safety_experts.files import path_inside
from safety_experts.preferences.reviewing.routes import PREFIX, add_review_routes

PAIR = f"{1:016x}"
SECRET = b"the secret outside"


class Shelf:
    """Datasets below one folder, as in ComfyUI."""

    def __init__(self, root: Path):
        self.root = root

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("*/dataset.json"))

    def folder(self, name: str) -> Path:
        return path_inside(self.root, name)


class Client:
    """Sends requests as they are, also those that no library would send."""

    def __init__(self, port: int):
        self.port = port

    def send(self, method: str, path: str, headers: dict | list | None = None, body: bytes = b""):
        """Return (status, headers, body); a `Host` among the headers replaces ours."""
        given = list(headers.items()) if isinstance(headers, dict) else list(headers or [])
        if not any(name == "Host" for name, _ in given):
            given.insert(0, ("Host", f"127.0.0.1:{self.port}"))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in given:
                connection.putheader(name, value)
            if body:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path: str, headers: dict | list | None = None, **query: str):
        return self.send("GET", f"{PREFIX}/{path}" + (f"?{urlencode(query)}" if query else ""), headers)

    def decide(self, dataset: str, pair_id: str, review: str | None, headers: dict | None = None):
        body = json.dumps({"dataset": dataset, "id": pair_id, "review": review}).encode()
        return self.send("POST", f"{PREFIX}/review", {"Content-Type": "application/json"} | (headers or {}), body)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder `datasets` with the dataset `toy`, beside a secret."""
    base = tmp_path_factory.mktemp("review")
    (base / "secret.txt").write_bytes(SECRET)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(base / "secret.png")
    make_review_dataset(base / "datasets" / "toy", 6)
    return base / "datasets"


@pytest.fixture(scope="module")
def client(shelf) -> Iterator[Client]:
    async def start() -> int:
        routes = web.RouteTableDef()
        add_review_routes(routes, Shelf(shelf))
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    loop = asyncio.new_event_loop()
    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield Client(port)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def state_of(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content; the cache of thumbnails and the lock apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts and path.name != ".lock"
    }


def test_the_page_and_all_its_files_are_served_and_named_in_it(client):
    status, headers, body = client.get("")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert b"http://" not in body and b"https://" not in body
    for name, content_type in (("main.mjs", "text/javascript"), ("review.css", "text/css")):
        assert f"page/{name}".encode() in body
        status, headers, content = client.get(f"page/{name}")
        assert (status, headers["Content-Type"]) == (200, f"{content_type}; charset=utf-8") and content


def test_pairs_come_in_file_order_with_what_judges_said(client, shelf):
    assert json.loads(client.get("datasets")[2]) == {"datasets": ["toy"]}
    pairs = json.loads(client.get("pairs", dataset="toy")[2])["pairs"]
    lines = [json.loads(line) for line in (shelf / "toy/metadata.jsonl").read_text().splitlines()]
    assert [pair["id"] for pair in pairs] == [line["id"] for line in lines]
    assert [pair["scores"] for pair in pairs] == [line["scores"] for line in lines]


def test_images_are_the_files_small_pictures_or_veils_without_detail(client, shelf):
    path = shelf / "toy/images" / f"{PAIR}-rejected.png"
    query = {"dataset": "toy", "id": PAIR, "side": "rejected"}
    status, headers, body = client.get("image", **query, size="full")
    assert (status, headers["Content-Type"]) == (200, "image/png") and body == path.read_bytes()
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    for size, kind, largest in (("thumbnail", "JPEG", 320), ("veil", "PNG", 10)):
        image = Image.open(io.BytesIO(client.get("image", **query, size=size)[2]))
        assert image.format == kind and max(image.size) <= largest


def test_a_thumbnail_is_made_once_and_anew_for_another_picture(client, shelf):
    path = shelf / "toy/images" / f"{PAIR}-chosen.png"
    query = {"dataset": "toy", "id": PAIR, "side": "chosen", "size": "thumbnail"}
    cache = shelf / "toy/.cache/thumbnails"
    first = client.get("image", **query)[2]
    kept = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert client.get("image", **query)[2] == first
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == kept
    original = path.read_bytes()
    Image.new("RGB", (64, 64), (0, 0, 255)).save(path)
    try:
        assert client.get("image", **query)[2] != first
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("review", ["accepted", "flipped", "dropped", None])
def test_a_decision_is_on_disk_when_it_is_answered(client, shelf, review):
    status, _, body = client.decide("toy", PAIR, review, {"Origin": f"http://127.0.0.1:{client.port}"})
    assert status == 200, body
    assert reviews_on_disk(shelf / "toy") == {f"{index:016x}": None for index in range(6)} | {PAIR: review}


def test_pairs_that_others_add_and_decide_are_seen(client, shelf, tmp_path):
    folder = make_review_dataset(shelf / "growing", 2)
    assert len(json.loads(client.get("pairs", dataset="growing")[2])["pairs"]) == 2
    more = make_review_dataset(tmp_path / "more", 3)
    for name in (f"images/{2:016x}-chosen.png", f"images/{2:016x}-rejected.png", "metadata.jsonl"):
        (folder / name).write_bytes((more / name).read_bytes())
    assert len(json.loads(client.get("pairs", dataset="growing")[2])["pairs"]) == 3
    assert client.decide("growing", f"{2:016x}", "dropped")[0] == 200
    assert reviews_on_disk(folder)[f"{2:016x}"] == "dropped"


# --- what is refused ---

BAD_HOSTS = ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "a@127.0.0.1", ""]
BAD_ORIGINS = [
    "http://evil.example",
    "null",
    "http://127.0.0.1",
    "http://localhost:PORT",
    "http://a@127.0.0.1:PORT",
    "",
]
BAD_SITES = ["cross-site", "same-site", "weird"]
OUTSIDE = [
    "../secret.txt", "..", ".", "/", "/etc/passwd", "toy/../../secret.txt", "toy/..", "..\\secret.txt", "C:\\Windows",
    "toy/images", "toy\0", "\0", "", "x" * 300, "x" * 2000, "%2e%2e", "~", "file:///etc/passwd", "nothing", "töy",
    "toy\n", "//evil/share",
]  # fmt: skip
BAD_BODIES = [
    b"", b"{", b"[]", b"null", b'"toy"', b'{"dataset": "toy"}', b"\xff\xfe", b"[" * 3000, b"{}" * 5000,
    b'{"dataset": "toy", "id": "%s", "review": "burned"}' % PAIR.encode(),
    b'{"dataset": "toy", "id": "%s", "review": 1}' % PAIR.encode(),
    b'{"dataset": "toy", "id": "nobody", "review": null}',
    b'{"dataset": "toy", "id": "../../secret", "review": "dropped"}',
    b'{"dataset": "toy", "id": "%s", "review": "dropped", "chosen_file_name": "../../secret.txt"}' % PAIR.encode(),
    b'{"dataset": ["toy"], "id": "%s", "review": "dropped"}' % PAIR.encode(),
]  # fmt: skip
BAD_TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json"]


def hostile_requests(port: int) -> Iterator[tuple[str, str, list[tuple[str, str]], bytes]]:
    """Yield (method, path, headers, body) of requests that must all be refused."""
    own, decision = (
        ("Host", f"127.0.0.1:{port}"),
        b'{"dataset": "toy", "id": "%s", "review": "dropped"}' % PAIR.encode(),
    )
    as_json = ("Content-Type", "application/json")
    image = f"{PREFIX}/image?dataset=toy&id={PAIR}&side=chosen&size="
    reads = [f"{PREFIX}/", f"{PREFIX}/page/main.mjs", f"{PREFIX}/datasets", f"{PREFIX}/pairs?dataset=toy"]
    reads += [image + size for size in ("full", "thumbnail", "veil")]
    foreign = [[("Host", host)] for host in BAD_HOSTS]
    foreign += [[own, ("Origin", origin.replace("PORT", str(port)))] for origin in BAD_ORIGINS]
    foreign += [[own, ("Sec-Fetch-Site", site)] for site in BAD_SITES]
    foreign += [[("Host", "evil.example"), ("Origin", "http://evil.example")], [own, ("Host", "evil.example")]]
    foreign += [[own, ("Origin", f"http://127.0.0.1:{port}"), ("Origin", "http://evil.example")]]
    for headers in foreign:
        yield from (("GET", path, headers, b"") for path in reads)
        yield "POST", f"{PREFIX}/review", [*headers, as_json], decision
    for name in OUTSIDE:
        yield "GET", f"{PREFIX}/pairs?dataset={quote(name, safe='')}", [own], b""
        yield "GET", f"{PREFIX}/image?dataset={quote(name, safe='')}&id={PAIR}&side=chosen&size=full", [own], b""
        yield "GET", f"{PREFIX}/image?dataset=toy&id={quote(name, safe='')}&side=chosen&size=full", [own], b""
        yield (
            "POST",
            f"{PREFIX}/review",
            [own, as_json],
            json.dumps({"dataset": name, "id": PAIR, "review": None}).encode(),
        )
        if name not in ("", ".", "/"):  # these are other routes' addresses
            yield "GET", f"{PREFIX}/page/{quote(name, safe='')}", [own], b""
    for name in ("../docs/SafetyExpertsTrain.md", "../../pyproject.toml", "..%2f..%2fpyproject.toml", "%00", "page"):
        yield "GET", f"{PREFIX}/page/{name}", [own], b""
    for side, size in itertools.product(["../chosen", "metadata", "", "chosen"], ["../full", "", "original"]):
        yield "GET", f"{PREFIX}/image?dataset=toy&id={PAIR}&side={side}&size={size}", [own], b""
    yield "GET", f"{PREFIX}/image?dataset=toy&dataset=../&id={PAIR}&side=chosen&size=full", [own], b""
    for body in BAD_BODIES:
        yield "POST", f"{PREFIX}/review", [own, as_json], body
    for content_type in BAD_TYPES:
        yield "POST", f"{PREFIX}/review", [own, ("Content-Type", content_type)], decision
    for method, path in itertools.product(
        ["PUT", "DELETE", "PATCH", "OPTIONS"], [f"{PREFIX}/review", f"{PREFIX}/pairs"]
    ):
        yield method, path, [own, as_json], decision


def test_every_hostile_request_is_refused_and_nothing_changes(client, shelf):
    before = state_of(shelf.parent)
    requests = list(hostile_requests(client.port))
    assert len(requests) >= 200
    for method, path, headers, body in requests:
        status, _, content = client.send(method, path, headers, body)
        assert 400 <= status < 500, (method, path, headers, body[:80], status, content[:200])
        assert SECRET not in content and b"root:" not in content and b"[project]" not in content
        assert b"Traceback" not in content and b"with thorns" not in content
    assert state_of(shelf.parent) == before
    assert client.get("pairs", dataset="toy")[0] == 200  # and it still answers the page


def test_a_name_is_answered_where_rebinding_cannot_reach_it(client, monkeypatch):
    named = {"Host": "comfy.example.org"}
    assert client.get("datasets", named)[0] == 403
    # Over https a browser says so, in a header that no script can set.
    assert client.get("datasets", named | {"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert (
        client.get("datasets", {"Host": f"localhost:{client.port}", "Origin": f"http://localhost:{client.port}"})[0]
        == 200
    )
    assert client.get("datasets", {"Host": "192.168.7.9:8188"})[0] == 200
    monkeypatch.setenv("SAFETY_EXPERTS_HOSTS", "other.example, Comfy.example.org")
    assert client.get("datasets", named)[0] == 200


@pytest.mark.parametrize("linked", ["image", "images", "metadata.jsonl", "dataset.json", ".cache", ".cache/thumbnails"])
def test_a_link_that_leads_out_is_neither_read_nor_written_through(client, shelf, linked):
    folder = make_review_dataset(shelf / f"linked-{linked.replace('/', '-')}", 1)
    outside = shelf.parent / f"outside-{folder.name}"
    outside.mkdir()
    if linked == "image":
        target = folder / f"images/{0:016x}-chosen.png"
        target.unlink()
        target.symlink_to(shelf.parent / "secret.png")
    elif linked in ("metadata.jsonl", "dataset.json"):
        (folder / linked).rename(outside / linked)
        (folder / linked).symlink_to(outside / linked)
    else:
        (folder / ".cache").mkdir()
        target = folder / linked
        if linked == "images":
            target.rename(outside / "images")
        elif target.exists():
            target.rmdir()
        target.symlink_to(outside / "images" if linked == "images" else outside, target_is_directory=True)
    before = state_of(shelf.parent)
    secret = (shelf.parent / "secret.png").read_bytes()
    query = {"dataset": folder.name, "id": f"{0:016x}", "side": "chosen"}
    for size in ("full", "thumbnail", "veil"):
        status, _, body = client.get("image", **query, size=size)
        assert body != secret
        assert status == 400 or (linked.startswith(".cache") and size == "full")
    assert state_of(shelf.parent) == before
    assert list(outside.rglob("*.jpg")) == []


@pytest.mark.parametrize("content", [b"<script>alert(1)</script>", b"", b"GIF89a"])
def test_what_is_no_picture_is_not_sent_as_one(client, shelf, content):
    folder = make_review_dataset(shelf / f"broken-{len(content)}", 1)
    (folder / f"images/{0:016x}-chosen.png").write_bytes(content)
    for size in ("full", "thumbnail", "veil"):
        status, _, body = client.get("image", dataset=folder.name, id=f"{0:016x}", side="chosen", size=size)
        assert status == 400 and (not content or content not in body)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_one_may_only_read_shows_its_pictures(client, shelf):
    folder = make_review_dataset(shelf / "read-only", 1)
    folder.chmod(0o555)
    query = {"dataset": "read-only", "id": f"{0:016x}", "side": "chosen", "size": "thumbnail"}
    assert client.get("image", **query)[0] == 200
    assert client.decide("read-only", f"{0:016x}", "dropped")[0] == 500


# --- the command ---


@pytest.mark.slow
def test_the_command_serves_its_one_dataset_on_loopback_and_a_kill_loses_nothing(tmp_path):
    folder = make_review_dataset(tmp_path / "toy", 20)
    make_review_dataset(tmp_path / "other", 1)
    expected = {}
    for index in range(20):  # killed after every fifth decision
        if index % 5 == 0:
            server = ReviewCommand(folder).__enter__()
            client = Client(int(server.url.split(":")[2].split("/")[0]))
            assert server.url.startswith("http://127.0.0.1:")
            assert json.loads(client.get("datasets")[2]) == {"datasets": ["toy"]}
            assert client.get("pairs", dataset="other")[0] == 400
        pair_id = f"{index:016x}"
        expected[pair_id] = ("accepted", "flipped", "dropped")[index % 3]
        assert client.decide("toy", pair_id, expected[pair_id])[0] == 200
        if index % 5 == 4:
            server.__exit__()
            assert {name: review for name, review in reviews_on_disk(folder).items() if review} == expected


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert run(["review", str(tmp_path / "nothing")]) == 2
    assert "no dataset folder" in capsys.readouterr().err
    folder = make_review_dataset(tmp_path / "toy", 1)
    with ReviewCommand(folder) as server:
        port = server.url.split(":")[2].split("/")[0]
        assert run(["review", str(folder), "--port", port]) == 1
    assert "choose another --port" in capsys.readouterr().err
