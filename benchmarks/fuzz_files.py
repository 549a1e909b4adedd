"""Sound files of every kind the pack reads, and what a stranger might make of them."""

import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = "zebrafinch"  # in every text of the files; it belongs into no error
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


class World:
    """Sound files to damage, a folder to work in, and a folder outside that nothing may touch."""

    def __init__(self, folder: Path):
        import torch
        from PIL import Image
        from safetensors.torch import save_file
        from safety_experts.experts.co_merge import save_activation_counts
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
        save_activation_counts(self.sound / "counts.safetensors", counts, experts, {})
        save_expert(merge_experts(experts, "co-merge", activation_counts=counts), self.sound / "co.safetensors")
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
        spoil_value(values, dice)
    return json.dumps(values)


def spoil_value(values: Any, dice: random.Random) -> None:
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
        spoil_value(values, dice)
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
        spoil_value(values, dice)
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
        spoil_value(values, dice)
        (folder / "dataset.json").write_text(json.dumps(values), encoding="utf-8")
