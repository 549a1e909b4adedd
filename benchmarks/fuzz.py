"""Attacks on the pack: thousands of damaged files and arguments through every verb, and prompts at a real server.

Three campaigns, all drawn from a seed: in process, through the real command, and hostile workflows and cancels on a
real ComfyUI. What must hold: no traceback, nothing that runs for more than 10 s, no byte changed outside the folder
that was meant, no server that dies, and no word of a prompt in an error. A case that breaks one of these is written
into the result with its seed; `--only SEED` runs it again.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safety_experts.evaluation.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
MARKER = "zebrafinch"  # in every text of the files; it belongs into no error
LIMIT_SECONDS = 10.0
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

# Values for an option, a cell, a field.
TEXTS = (
    *("", " ", "0", "-1", "1", "2", "1e400", "nan", "inf", "-inf", "1e12", "9" * 5000, "0x10", "true", "null", "[]"),
    *(
        "..",
        "../..",
        "/",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "~",
        ".",
        "-",
        "--",
        "x" * 300,
        "日本語",
        "\x1b[31m",
        "a\nb",
    ),
    *(
        "%s%n",
        "{0}",
        "$(id)",
        "\udcff",
        "violence",
        "hate",
        "fp16",
        "cpu",
        "bogus",
        "cuda:99",
        "meta",
        "linear",
        "ties",
    ),
    *(
        f"{MARKER}",
        f"{MARKER} | {MARKER}",
        "steps=1e400",
        "beta=[" + "[" * 900,
        "rank=&a [*a]",
        "seed=2001-13-45",
        "=",
        "a=b=c",
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**400,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        MARKER,
    ),
    *(
        [],
        {},
        [None],
        [[]],
        {"": None},
        {"a": {"b": []}},
        ["x"] * 50,
        "\x1b[2J",
        "../../x",
        "/etc/passwd",
        "y" * 20_000,
        "\ud800",
    ),
)
DATASET_VERBS = ("split", "leaks", "merge", "judge", "stats", "write", "nonsense")
VERBS = (
    "inspect",
    "convert",
    "merge",
    "protect",
    "extract",
    "reproduce",
    "train",
    "import",
    "check",
    "stats",
    "export",
    "any",
)


@dataclass
class Finding:
    """What one case broke."""

    seed: int
    verb: str
    problem: str
    arguments: list[str]


@dataclass
class Report:
    """Of one campaign."""

    num_cases: int = 0
    exit_codes: Counter = field(default_factory=Counter)
    verbs: Counter = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        kinds = Counter(finding.problem.split(":")[0] for finding in self.findings)
        return {
            "cases": self.num_cases,
            "by_verb": dict(sorted(self.verbs.items())),
            "exit_codes": {str(code): count for code, count in sorted(self.exit_codes.items(), key=str)},
            "slowest_seconds": round(self.slowest_seconds, 2),
            **{kind: kinds.get(kind, 0) for kind in ("traceback", "hang", "changed outside", "told a text", "other")},
            "findings": [vars(finding) for finding in self.findings[:20]],
        }


class World:
    """Sound files to damage, a folder to work in, and a folder outside that nothing may touch."""

    def __init__(self, folder: Path):
        import torch
        from PIL import Image
        from safetensors.torch import save_file
        from safety_experts.experts.co_merge import save_statistics
        from safety_experts.experts.expert import Expert, LoraLayer
        from safety_experts.experts.expert_file import load_expert, save_expert
        from safety_experts.experts.info import ExpertInfo
        from safety_experts.experts.merging import merge_experts
        from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
        from safety_experts.preferences.pairs import PromptPair

        self.folder, self.sound, self.work, self.outside = (
            folder,
            folder / "sound",
            folder / "work",
            folder / "outside",
        )
        for made in (self.sound, self.outside):
            made.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)

        def random_tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        experts = []
        for name in ("violence", "hate"):
            layers = {
                LAYER: LoraLayer(random_tensor(2, 5), random_tensor(6, 2), 2.0),
                "lora_unet_down_blocks_0_resnets_0_conv1": LoraLayer(
                    random_tensor(2, 3, 3, 3), random_tensor(4, 2, 1, 1), 1.0
                ),
            }
            save_expert(Expert(layers, ExpertInfo(categories=(name,)), name), self.sound / f"{name}.safetensors")
            experts.append(load_expert(self.sound / f"{name}.safetensors"))
        save_expert(merge_experts(experts, "linear"), self.sound / "merged.safetensors")
        counts = {
            layer: torch.ones(2, part.up.shape[0], dtype=torch.int64) for layer, part in experts[0].layers.items()
        }
        save_statistics(self.sound / "counts.safetensors", counts, experts, {})
        save_expert(merge_experts(experts, "co-merge", statistics=counts), self.sound / "co.safetensors")
        for path in sorted((ROOT / "tests" / "experts" / "golden").glob("*.safetensors")):
            shutil.copy(path, self.sound / f"golden_{path.name}")
        loha = {
            f"{LAYER}.hada_w{i}_{part}": random_tensor(*shape)
            for i in (1, 2)
            for part, shape in (("a", (6, 2)), ("b", (2, 5)))
        }
        save_file({**loha, f"{LAYER}.alpha": torch.tensor(2.0)}, self.sound / "loha.safetensors")
        lokr = {f"{LAYER}.lokr_w1": random_tensor(2, 5), f"{LAYER}.lokr_w2": random_tensor(3, 1)}
        save_file(lokr, self.sound / "lokr.safetensors")
        key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        peft = {f"{key}.lora_A.weight": random_tensor(2, 5), f"{key}.lora_B.weight": random_tensor(6, 2)}
        adapter = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 2}})}
        save_file(peft, self.sound / "peft.safetensors", adapter)
        weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        base = {weight: random_tensor(6, 5), "conv_norm_out.weight": random_tensor(4)}
        save_file(base, self.sound / "base.safetensors")
        save_file({**base, weight: base[weight] + random_tensor(6, 5)}, self.sound / "tuned.safetensors")

        dataset = PreferenceDataset.create(self.sound / "pairs", DatasetInfo({}, {"steps": 4}, MARKER, ""))
        for seed in range(3):
            pair = PromptPair(f"{MARKER} {seed} thorns", f"{MARKER} {seed}", ("violence",), seed)
            dataset.add(pair, Image.new("RGB", (8, 8), (seed, 0, 0)), Image.new("RGB", (8, 8), (0, seed, 0)))
        rows = "".join(f"{MARKER} {n} thorns,{MARKER} {n},violence,{n}\n" for n in range(3))
        (self.sound / "prompts.csv").write_text("prompt,safe_prompt,category,seed\n" + rows, encoding="utf-8")
        line = json.dumps({"prompt": f"{MARKER} thorns", "safe_prompt": MARKER, "categories": ["hate"]})
        (self.sound / "prompts.jsonl").write_text(line + "\n", encoding="utf-8")
        (self.sound / "recipe.yaml").write_text("objective: hinge\nbeta: 10\nsteps: 2\n", encoding="utf-8")
        shipped = next((ROOT / "preferences").glob("*.yaml"), None)
        taxonomy = shipped.read_text(encoding="utf-8") if shipped else f"categories:\n  violence: [{MARKER}]\n"
        (self.sound / "taxonomy.yaml").write_text(taxonomy, encoding="utf-8")

        (self.outside / "precious.txt").write_text("no line break at the end")
        (self.outside / "precious.jsonl").write_text('{"a": 1}\n')
        (self.outside / "pictures").mkdir()
        Image.new("RGB", (4, 4)).save(self.outside / "pictures" / ".hidden.png")
        shutil.copy(self.sound / "hate.safetensors", self.outside / "hate.safetensors")
        self._state_outside = self._snapshot()

    def _snapshot(self) -> dict[str, tuple[int, bytes]]:
        found = {}
        for path in sorted(self.outside.rglob("*")):
            found[str(path)] = (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        return found

    def changed_outside(self) -> bool:
        """Say whether anything outside is not what it was, and mend it."""
        return self._snapshot() != self._state_outside

    def refresh(self) -> None:
        """Put sound files into an empty working folder."""
        if self.work.exists():
            for path in self.work.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o700)
            shutil.rmtree(self.work)
        shutil.copytree(self.sound, self.work)


def draw_case(world: World, seed: int) -> tuple[str, list[str]]:
    """Damage files of the working folder and return (verb, arguments) of one case."""
    from safety_experts.commands import COMMANDS

    dice = random.Random(seed)
    world.refresh()
    verb = dice.choice(VERBS)
    work = world.work
    loras = [path for path in sorted(work.glob("*.safetensors")) if path.stem not in ("base", "tuned", "counts")]
    files = {
        "inspect": dice.sample(loras, 1),
        "convert": dice.sample(
            [*loras, *[work / "loha.safetensors", work / "lokr.safetensors", work / "peft.safetensors"] * 3], 1
        ),
        "merge": dice.sample(loras, dice.randint(1, 3)),
        "protect": dice.sample(loras, 2),
        "extract": [work / "tuned.safetensors", work / "base.safetensors"],
        "reproduce": [
            dice.choice([path for path in loras if "merged" in path.stem or path.stem in ("co", "golden_protected")])
        ],
        "train": [work / "pairs"],
        "import": [work / dice.choice(["prompts.csv", "prompts.jsonl", "taxonomy.yaml", "pairs"])],
        **{name: [work / "pairs"] for name in ("check", "stats", "export")},
        "any": [dice.choice([work / "prompts.csv", work / "pairs", *loras])],
    }[verb]
    for path in files:
        if dice.random() < 0.6:
            damage(path, dice, world)
    out = ["--out", str(work / "made" / f"out{dice.randint(0, 1)}.safetensors")]
    names = [str(path) for path in files]
    commands = [name for name in (*COMMANDS, "mrege", "--help") if name != "demo"]  # which takes minutes
    arguments = {
        "inspect": ["inspect", *names, *(["--json"] if dice.random() < 0.3 else [])],
        "convert": ["convert", *names, *out],
        "merge": ["merge", *names, *out, *_merge_options(dice, work)],
        "protect": ["protect", names[0], "--expert", names[-1], *(out if dice.random() < 0.8 else [])],
        "extract": ["extract", *names, *out, "--rank", "2"],
        "reproduce": [
            "reproduce",
            *names,
            *(["--statistics", str(work / "counts.safetensors")] if dice.random() < 0.3 else []),
        ],
        "train": [
            "train",
            "--model",
            str(dice.choice([work / "tuned.safetensors", *loras])),
            "--dataset",
            *names,
            *out,
        ],
        "import": ["dataset", "import", *names, "--out", str(work / dice.choice(["made", "pairs"]))],
        "check": ["dataset", "check", *names],
        "stats": ["dataset", "stats", *names],
        "export": [
            "dataset",
            "export",
            *names,
            "--format",
            dice.choice(["coprov2", "trl", "kohya"]),
            "--out",
            str(work / "made"),
        ],
        "any": [*dice.choice([[name] for name in commands] + [["dataset", name] for name in DATASET_VERBS]), *names],
    }[verb]
    if verb == "train":
        arguments += _train_options(dice, work)
    if verb == "import" and dice.random() < 0.3:
        arguments += ["--images", str(dice.choice([work / "pairs" / "images", work, world.outside / "pictures"]))]
    if dice.random() < 0.25:
        _spoil_arguments(arguments, dice)
    if "review" in arguments:  # would serve until it is stopped
        arguments.append("--prot=1")
    return verb, arguments


def _merge_options(dice: random.Random, work: Path) -> list[str]:
    from safety_experts.experts.merging import METHODS

    method = dice.choice([*METHODS])
    options = ["--method", method]
    for parameter in METHODS[method].parameters:
        if dice.random() < 0.3:
            options += ["--set", f"{parameter.name}={dice.choice(TEXTS)}"]
    if METHODS[method].needs_statistics and dice.random() < 0.8:
        counts = work / "counts.safetensors"
        if dice.random() < 0.5:
            damage(counts, dice, None)
        options += ["--statistics", str(counts)]
    if dice.random() < 0.4:
        options += ["--weights", dice.choice(["1,1", "0", "1e30,1e30", "nan,1", ",", "1e38", *TEXTS])]
    return options


def _train_options(dice: random.Random, work: Path) -> list[str]:
    recipe = work / "recipe.yaml"
    if dice.random() < 0.7:
        damage(recipe, dice, None)
    options = ["--recipe", str(recipe), "--device", "cpu"]
    for _ in range(dice.randint(0, 2)):
        options += ["--set", f"{dice.choice(['beta', 'steps', 'objective', 'rank', 'seed', 'x'])}={dice.choice(TEXTS)}"]
    if dice.random() < 0.2:
        options += ["--with-expert", str(work / "hate.safetensors")]
    return options


def _spoil_arguments(arguments: list[str], dice: random.Random) -> None:
    kind = dice.randrange(4)
    if kind == 0:
        arguments[dice.randrange(1, len(arguments)) if len(arguments) > 1 else 0] = dice.choice(TEXTS)
    elif kind == 1:
        option = dice.choice(
            ["--rank", "--energy", "--strength", "--space", "--device", "--set", "--format", "--images", "--jsno"]
        )
        arguments += [option, dice.choice(TEXTS)]
    elif kind == 2:
        arguments.pop(dice.randrange(len(arguments)))
    else:
        arguments.insert(dice.randrange(len(arguments) + 1), dice.choice(TEXTS))


def damage(path: Path, dice: random.Random, world: World | None) -> None:
    """Turn a sound file or folder into one that a stranger might send."""
    if path.is_dir():
        _damage_dataset(path, dice, world)
    elif world is not None and dice.random() < 0.08:
        _replace_by_something_else(path, dice, world)
    elif path.suffix == ".safetensors":
        _damage_tensors(path, dice)
    else:
        _damage_text(path, dice)


def _replace_by_something_else(path: Path, dice: random.Random, world: World) -> None:
    path.unlink()
    kind = dice.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to(world.outside / "absent")
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.symlink_to(dice.choice([Path("/dev/zero"), Path("/dev/null"), Path("/proc/self/mem")]))
    elif kind == 5:
        path.write_bytes(b"")
    else:
        path.symlink_to(world.outside / dice.choice(["precious.txt", "hate.safetensors", "precious.jsonl"]))


def _damage_tensors(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    kind = dice.choice([0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 7, 8, 9])
    if kind == 0:
        path.write_bytes(data[: dice.randrange(len(data))])
        return
    if kind == 1:
        spoilt = bytearray(data)
        for _ in range(dice.randint(1, 20)):
            spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        path.write_bytes(bytes(spoilt))
        return
    if kind in (2, 3, 4):
        metadata = header.setdefault("__metadata__", {})
        key = dice.choice(["safety_experts", "lora_adapter_metadata", "safety_experts_statistics"])
        metadata[key] = _damaged_metadata(metadata.get(key), dice)
    elif kind == 5:
        name = dice.choice(names)
        begin, end = header[name]["data_offsets"]
        patterns = [b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00", b"\x7f"]  # NaN, infinite, huge
        pattern = dice.choice(patterns)
        body[begin:end] = (pattern * (end - begin))[: end - begin]
    elif kind == 6:
        name = dice.choice(names)
        count = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        dtype, size = dice.choice(
            [
                ("I8", 1),
                ("F8_E4M3", 1),
                ("U8", 1),
                ("BOOL", 1),
                ("F16", 2),
                ("I16", 2),
                ("I32", 4),
                ("F64", 8),
                ("C64", 8),
            ]
        )
        shape = dice.choice(
            [[count // size], [count // size, 1], [1, count // size], [0], [], [count // size, 1, 1, 1]]
        )
        header[name] |= {"dtype": dtype, "shape": shape}
    elif kind == 7:
        name = dice.choice(names)
        suffixes = [
            ".lora_A.weight",
            ".dora_scale",
            ".lokr_w1",
            ".hada_t1",
            ".alpha",
            "x" * 5000,
            ".lora_down.weight" * 200,
            "\x1b",
            "",
        ]
        header[name.rpartition(".")[0] + dice.choice(suffixes)] = header.pop(name)
    elif kind == 8:
        for name in dice.sample(names, dice.randint(1, len(names))):
            del header[name]
    else:
        name = dice.choice(names)
        header[name][dice.choice(["dtype", "shape", "data_offsets"])] = dice.choice(
            [value for value in VALUES if value != "\ud800"]
        )
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))


def _damaged_metadata(text: str | None, dice: random.Random) -> str:
    bombs = [
        "[" * 100_000,
        '{"a":' * 3000,
        "9" * 6000,
        "{",
        "null",
        "",
        '{"format_version": 1, "seed": ' + "9" * 6000 + "}",
    ]
    bombs += [
        '{"unet.lora_alpha": 1e999}',
        '{"unet.alpha_pattern": {"(a+)+$": 3, "' + "(.*a){25}" + '": 1}}',
        '{"unet.alpha_pattern": []}',
    ]
    if text is None or dice.random() < 0.25:
        return dice.choice(bombs)
    values = json.loads(text)
    for _ in range(dice.randint(1, 3)):
        _spoil_value(values, dice)
    return json.dumps(values)


def _spoil_value(values: Any, dice: random.Random) -> None:
    """Replace, add or remove one value somewhere in a JSON tree."""
    place = values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys or dice.random() < 0.1:
            break
        key = dice.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.7:
            place = place[key]
            continue
        if dice.random() < 0.2 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = copy.deepcopy(dice.choice(VALUES))  # which is itself spoilt next
        return
    if isinstance(place, dict):
        place[dice.choice(["name", "origin", "parents", "method", "x", MARKER])] = copy.deepcopy(dice.choice(VALUES))


def _damage_text(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    kind = dice.randrange(8)
    if kind == 0:
        data = data.decode().encode(dice.choice(["utf-16", "utf-32", "utf-8-sig"]))
    elif kind == 1:
        data = data[: dice.randrange(len(data) + 1)]
    elif kind == 2:
        place = dice.randrange(len(data) + 1)
        data = (
            data[:place]
            + dice.choice([b"\0", b"\xff\xfe", b"\r", b'"', b"\xed\xa0\x80", b"," * 100, b"[" * 3000, b"{"])
            + data[place:]
        )
    elif kind == 3:
        bombs = [
            b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
            b"a: !!python/object:os.system x\n",
            b"!!int x",
        ]
        bombs += [
            b"2001-13-45: 1\n",
            b"beta: 2001-13-45\n",
            b"? [a]\n: 1\n",
            b"1: 2\n",
            b"a: " + b"[" * 3000,
            b"\xe9t\xe9: 1",
            b"pairs_per_category: 1e12\n",
        ]
        data = dice.choice(bombs) + (data if dice.random() < 0.5 else b"")
    elif kind == 4:
        words = data.split(b" ")
        words[dice.randrange(len(words))] = dice.choice(TEXTS).encode("utf-8", "surrogateescape")
        data = b" ".join(words)
    elif kind == 5:
        data = b"\n".join(dice.sample(lines := data.split(b"\n"), len(lines)))
    elif kind == 6:
        data = data.replace(b":", dice.choice([b"", b"=", b"::", b": &x "])).replace(
            b",", dice.choice([b";", b"\t", b",,"])
        )
    elif path.suffix == ".jsonl":
        values = json.loads(data.splitlines()[0])
        _spoil_value(values, dice)
        data = json.dumps(values).encode() + (b"\n" if dice.random() < 0.5 else b"")
    else:
        data = bytes(dice.randrange(256) for _ in range(dice.randrange(200)))
    path.write_bytes(data)


def _damage_dataset(folder: Path, dice: random.Random, world: World | None) -> None:
    kind = dice.randrange(8)
    images = sorted((folder / "images").iterdir())
    own = folder / dice.choice(["metadata.jsonl", "dataset.json"])
    if kind in (0, 1):
        _damage_text(own, dice)
    elif kind == 2:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        values = json.loads(lines[-1])
        _spoil_value(values, dice)
        lines[-1] = json.dumps(values)
        (folder / "metadata.jsonl").write_text("\n".join(lines) + dice.choice(["", "\n"]), encoding="utf-8")
    elif kind == 3 and world is not None:
        name = dice.choice(["metadata.jsonl", "dataset.json", ".lock", "images", ".cache", "prompt_pairs.jsonl"])
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(world.outside / dice.choice(["precious.txt", "precious.jsonl", "pictures", "absent"]))
    elif kind == 4:
        image = dice.choice(images)
        image.write_bytes(dice.choice([b"", b"\x89PNG\r\n\x1a\n", image.read_bytes()[:40], b"GIF89a" + b"\0" * 50]))
    elif kind == 5 and world is not None:
        image = dice.choice(images)
        image.unlink()
        image.symlink_to(world.outside / "pictures" / ".hidden.png")
    elif kind == 6:
        own.unlink()
        dice.choice([own.mkdir, lambda: os.mkfifo(own)])()
    else:
        values = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        _spoil_value(values, dice)
        (folder / "dataset.json").write_text(json.dumps(values), encoding="utf-8")


class Hang(BaseException):
    """A case took longer than it may."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)  # one C call that does not return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def run_in_process(world: World, seed: int) -> tuple[str, list[str], int | None, str, float]:
    """Return (verb, arguments, exit code or None for a hang, stdout and stderr, seconds)."""
    from safety_experts.commands import run

    verb, arguments = draw_case(world, seed)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code: int | None = None
    start = time.perf_counter()
    try:
        with _alarm(LIMIT_SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
    except Hang:
        pass
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        err.write(f"Traceback: {type(error).__name__}: {error}")
        code = 1
    seconds = time.perf_counter() - start
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return verb, arguments, code, "\0".join(texts), seconds


def run_command(world: World, seed: int) -> tuple[str, list[str], int | None, str, float]:
    """Do the same through the real command, whose start takes seconds of its own."""
    verb, arguments = draw_case(world, seed)
    arguments = [word.replace("\0", "") for word in arguments]
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    start = time.perf_counter()
    before = os.times()
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, cwd=world.folder, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return verb, arguments, None, "", time.perf_counter() - start
    after = os.times()
    text = "\0".join(stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return verb, arguments, done.returncode, text, seconds


def judge(world: World, code: int | None, text: str, arguments: Sequence[str]) -> str | None:
    """Return what a case broke, or None."""
    printed, errors = text.split("\0", 1) if "\0" in text else (text, "")
    if world.changed_outside():
        return "changed outside: something that nobody named is another one now"
    if code is None:
        return f"hang: longer than {LIMIT_SECONDS:g} s"
    if "Traceback" in errors or "error: unexpected" in errors:
        return f"traceback: {errors[-300:]}"
    if code not in (0, 1, 2):
        return f"other: exit code {code}: {errors[-200:]}"
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    if code and len(ours) != 1:
        return f"other: {len(ours)} error lines: {errors[-200:]}"
    # A file's name is where something is wrong, and a recipe's words are its user's own.
    told = errors.replace(f"/{MARKER}", "") if "error: recipe" not in errors else ""
    if MARKER in told and not any(MARKER in word for word in arguments):
        return f"told a text: {errors[-200:]}"
    if "\x1b" in errors + printed and not any("\x1b" in word for word in arguments):
        return "other: an escape sequence of a file on the terminal"
    if leftovers := [path.name for path in world.work.rglob(".*-????????.safetensors")]:
        return f"other: left {leftovers[0]}"
    return _judge_output(arguments, code)


def _judge_output(arguments: Sequence[str], code: int) -> str | None:
    """Whatever a verb calls done is a sound LoRA, as the safetensors library reads it."""
    import torch
    from safetensors.torch import load_file

    writes = arguments[:1] and arguments[0] in ("merge", "convert", "protect", "extract") and "--out" in arguments[:-1]
    if code or not writes or "--help" in arguments:
        return None
    path = Path(arguments[arguments.index("--out") + 1])
    try:
        tensors = load_file(path)
    except Exception as error:
        return f"other: exit 0, but what it wrote cannot be read: {type(error).__name__}"
    if not any(key.endswith("lora_down.weight") for key in tensors):
        return "other: exit 0, but it wrote no layer"
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or not torch.isfinite(tensor.float()).all():
            return f"other: exit 0, but it wrote {key} as {tensor.dtype} {list(tensor.shape)}, or not finite"
    return None


def campaign(world: World, seeds: Sequence[int], run: Callable[[World, int], Any], show: bool = False) -> Report:
    """Run cases and judge them."""
    report = Report()
    for seed in seeds:
        verb, arguments, code, text, seconds = run(world, seed)
        report.num_cases += 1
        report.verbs[verb] += 1
        report.exit_codes["hang" if code is None else code] += 1
        report.slowest_seconds = max(report.slowest_seconds, seconds)
        problem = judge(world, code, text, arguments)
        if not problem and seconds > LIMIT_SECONDS:
            problem = f"hang: {seconds:.1f} s"
        if problem:
            report.findings.append(Finding(seed, verb, problem, [word[:200] for word in arguments]))
            if show:
                print(f"seed {seed} {verb}: {problem}\n  {' '.join(arguments)[:500]!r}", flush=True)
        if show and report.num_cases % 500 == 0:
            print(f"{report.num_cases} cases, {len(report.findings)} findings", flush=True)
    return report


def hostile_prompts(num_prompts: int, num_cancels: int, seed: int) -> dict[str, Any]:
    """Send damaged workflows to a real server, and cancel sound ones at random moments; return counts."""
    from safety_experts.demo.comfyui import ComfyServer
    from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
    from safety_experts.errors import SafetyExpertsError

    dice = random.Random(seed)
    counts: Counter = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder) / "server") as server:
        world = World(Path(folder) / "world")
        server.add_model(ensure_toy_checkpoint())
        loras = server.base_directory / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        graphs = _sound_graphs(world, loras)
        start = time.perf_counter()
        for number in range(num_prompts):
            world.refresh()
            for path in sorted(world.work.glob("*.safetensors")):
                if dice.random() < 0.5:
                    damage(path, dice, None)
                shutil.copy(path, loras / path.name)
            graph = json.loads(json.dumps(dice.choice(graphs)))
            for _ in range(dice.randint(1, 2)):
                _spoil_graph(graph, dice)
            try:
                entry = _finished(server, server.queue(graph))
            except (urllib.error.HTTPError, ValueError):
                counts["refused when queued"] += 1
            except SafetyExpertsError as error:
                if "stopped with exit code" in str(error):
                    raise
                counts["refused when queued"] += 1
            else:
                if entry is None:
                    counts["hang"] += 1
                    findings.append(f"hang: {json.dumps(graph)[:600]}")
                else:
                    _judge_entry(entry, counts, findings, graph)
            if world.changed_outside():
                findings.append(f"changed outside: {json.dumps(graph)[:600]}")
            if number % 50 == 49:
                print(f"{number + 1} prompts, {dict(counts)}", flush=True)
        cancels = _cancel(server, num_cancels, dice)
        (loras / "hate.safetensors").write_bytes((world.sound / "hate.safetensors").read_bytes())
        last = _finished(server, server.queue(graphs[0]))
        alive = last is not None and last["status"]["status_str"] == "success"
        told = MARKER in server.log_text()
        seconds = time.perf_counter() - start
    return {
        "prompts": num_prompts,
        "outcomes": dict(sorted(counts.items())),
        "tracebacks": sum(finding.startswith("traceback") for finding in findings),
        "hang": counts["hang"],
        "changed outside": sum(finding.startswith("changed") for finding in findings),
        "cancels": cancels,
        "server deaths": 0,
        "a sound workflow runs at the end": alive,
        "text of a prompt in the log": told,
        "seconds": round(seconds),
        "findings": findings[:20],
    }


def _finished(server: Any, prompt_id: str) -> dict[str, Any] | None:
    """Return a workflow's history entry; None where it did not even end when it was cancelled.

    One that asks for much work is cancelled after a while, as a person would.
    """
    start = time.monotonic()
    while (entry := server.history(prompt_id)) is None:
        waited = time.monotonic() - start
        if waited > 15:
            server.interrupt()
        if waited > 15 + 3 * LIMIT_SECONDS:  # between two steps of a sampler on a busy CPU
            return None
        time.sleep(0.05)
    return entry


def _sound_graphs(world: World, loras: Path) -> list[dict[str, Any]]:
    for path in world.sound.glob("*.safetensors"):
        shutil.copy(path, loras / path.name)

    def load(name: str) -> dict[str, Any]:
        return {"class_type": "SafetyExpertsLoad", "inputs": {"expert_name": f"{name}.safetensors"}}

    def merge(method: str, **options: Any) -> dict[str, Any]:
        inputs = {"experts.expert_0": ["1", 0], "experts.expert_1": ["2", 0], "method": method, "weights": "1, 1"}
        return {
            "class_type": "SafetyExpertsMerge",
            "inputs": {**inputs, **{f"method.{k}": v for k, v in options.items()}},
        }

    def save(node: str) -> dict[str, Any]:
        return {"class_type": "SafetyExpertsSave", "inputs": {"expert": [node, 0], "expert_name": "fuzz/out"}}

    protect = {"style": ["1", 0], "experts.expert_0": ["2", 0], "space": "output", "strength": 1.0}
    graphs = [
        {"1": load("hate"), "2": load("hate"), "3": merge(method), "4": save("3")}
        for method in ("linear", "ties", "svd", "karcher", "della")
    ]
    names = sorted(path.stem for path in world.sound.glob("*.safetensors"))
    graphs += [{"1": load(name), "2": load("violence"), "3": merge("linear"), "4": save("3")} for name in names]
    graphs.append(
        {
            "1": load("hate"),
            "2": load("violence"),
            "3": {"class_type": "SafetyExpertsProtect", "inputs": protect},
            "4": save("3"),
        }
    )
    for path in sorted((ROOT / "example_workflows" / "api").glob("*.json")):
        graphs.append(json.loads(path.read_text(encoding="utf-8").replace("thorns", MARKER)))
    return graphs


def _spoil_graph(graph: dict[str, Any], dice: random.Random) -> None:
    own = [node for node in graph.values() if str(node.get("class_type", "")).startswith("SafetyExperts")]
    inputs = dice.choice(own or list(graph.values()))["inputs"]
    key = dice.choice([*inputs, "extra"])
    # ComfyUI itself logs a value that is in none of its lists, so no marker is put there.
    texts = [text for text in TEXTS if (text.isprintable() or text == "\x1b[31m") and MARKER not in text]
    values = [
        value
        for value in VALUES
        if value not in ("\ud800", MARKER, 10**400) and value == value and value != float("inf")
    ]
    inputs[key] = copy.deepcopy(dice.choice([*texts, *values]))
    if dice.random() < 0.1:
        del inputs[key]


def _judge_entry(entry: dict[str, Any], counts: Counter, findings: list[str], graph: Any) -> None:
    counts[entry["status"]["status_str"]] += 1
    for event, data in entry["status"]["messages"]:
        if event == "execution_error" and str(data.get("node_type", "")).startswith("SafetyExperts"):
            kind, text = str(data.get("exception_type", "")), str(data.get("exception_message", ""))
            if kind.endswith(("InputError", "SafetyExpertsError", "StoppedError")):
                counts["said in one line"] += 1
            else:
                findings.append(f"traceback: {data.get('node_type')} {kind}: {text[:200]} {json.dumps(graph)[:300]}")
            if MARKER in text:
                findings.append(f"told a text: {text[:200]}")


def _cancel(server: Any, num_cancels: int, dice: random.Random) -> dict[str, Any]:
    """Cancel the drawing of a dataset at random moments; the server must take the next prompt every time."""
    outcomes: Counter = Counter()
    sound = (ROOT / "example_workflows" / "api" / "1_build_preference_dataset.json").read_text(encoding="utf-8")
    for number in range(num_cancels):
        graph = json.loads(sound)
        for node in graph.values():
            if "dataset_name" in node["inputs"]:
                node["inputs"]["dataset_name"] = f"cancelled_{number}"
        prompt_id = server.queue(graph)
        time.sleep(dice.uniform(0.0, 1.5))
        server.interrupt()
        deadline = time.monotonic() + 120
        while (entry := server.history(prompt_id)) is None and time.monotonic() < deadline:
            server.interrupt()  # the first may have come before the work began
            time.sleep(0.2)
        events = [event for event, _ in entry["status"]["messages"]] if entry else ["hang"]
        outcomes["interrupted" if "execution_interrupted" in events else events[-1]] += 1
    return {"asked": num_cancels, **outcomes}


def main() -> None:
    """Run the campaigns and write their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--cancels", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="SEED", help="run one case and show it")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder) / "world")
            print(run_in_process(world, arguments.only))
        return
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    first = arguments.seed * 1_000_000
    for name, count, run in (
        ("in_process", arguments.cases, run_in_process),
        ("command", arguments.commands, run_command),
    ):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                tempfile.tempdir = folder  # where tracebacks of unforeseen errors would go
                report = campaign(World(Path(folder) / "world"), range(first, first + count), run, show=True)
                tempfile.tempdir = None
            result[name] = report.to_json() | {"machine": describe_machine()}
            first += 500_000
    if arguments.prompts or arguments.cancels:
        result["server"] = hostile_prompts(arguments.prompts, arguments.cancels, arguments.seed) | {
            "machine": describe_machine()
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {name: {k: v for k, v in part.items() if k != "machine"} for name, part in result.items()}, indent=1
        )[:6000]
    )


if __name__ == "__main__":
    main()
