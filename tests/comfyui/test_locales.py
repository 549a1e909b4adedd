"""What the interface says: help pages, and three languages, made from the nodes and from words/zh.json and ja.json.

`python tests/comfyui/test_locales.py` writes `locales/`, and the inputs and outputs of the help pages. A text that is
new or changed has no translation until a line in words/ gives it one; leave the English there when you do not speak
the language.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from safety_experts.demo.comfyui import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
LANGUAGES = ("en", "zh", "ja")
SPECIAL = re.compile(r"[{}@|]")  # of vue-i18n's messages, where | parts singular from plural

Json = dict[str, Any]


def inputs_of(given: Json, prefix: str = "") -> Json:
    """Return input name -> its options, those within dynamic inputs too, as `source.text`."""
    found = {}
    for kind, group in given.items():
        if kind == "hidden":
            continue
        for name, (_, *options) in group.items():
            about = options[0] if options else {}
            found[prefix + name] = about
            if "template" in about:
                found |= {
                    f"{prefix}{name}.{key}": value
                    for key, value in inputs_of(about["template"].get("input", {})).items()
                }
            for option in about.get("options") or []:
                if isinstance(option, dict):
                    found |= inputs_of(option["inputs"], f"{prefix}{name}.")
    return found


def our_nodes(object_info: Json) -> Json:
    return {name: node for name, node in sorted(object_info.items()) if name.startswith("SafetyExperts")}


def node_words(node: Json) -> Json:
    """Return a node's English, in the shape of ComfyUI's nodeDefs."""
    inputs = {
        name.replace(".", "_"): {"name": about.get("display_name") or name.rpartition(".")[2]}
        | ({"tooltip": about["tooltip"]} if about.get("tooltip") else {})
        for name, about in inputs_of(node["input"]).items()
    }
    outputs = {
        str(number): {"name": name, "tooltip": tooltip}
        for number, (name, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"], strict=True))
    }
    words = {"display_name": node["display_name"], "description": node["description"], "inputs": inputs}
    return words | ({"outputs": outputs} if outputs else {})


def setting_words() -> tuple[Json, list[str]]:
    """Return the settings' English by id, and what their places in the dialog are called."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.js")))
    found, places = {}, []
    for block in re.findall(r"\{\s*id: \"SafetyExperts\.\w+\",.*?defaultValue", source, re.DOTALL):
        text = {
            key: json.loads(f'"{value}"')
            for key, value in re.findall(r'\b(id|name|tooltip): "((?:[^"\\]|\\.)*)"', block)
        }
        found[text["id"].replace(".", "_")] = {key: text[key] for key in ("name", "tooltip") if key in text}
        places += re.findall(r'"([^"]+)"', re.search(r"category: \[(.*?)\]", block).group(1))[:-1]
    return found, sorted(set(places))


def english(object_info: Json) -> dict[str, Json]:
    """Return file name -> what it holds."""
    nodes = our_nodes(object_info)
    categories = sorted({part for node in nodes.values() for part in node["category"].split("/")})
    settings, places = setting_words()
    return {
        "nodeDefs.json": {name: node_words(node) for name, node in nodes.items()},
        "settings.json": settings,
        "main.json": {
            "nodeCategories": {name: name for name in categories},
            "settingsCategories": {name: name for name in places},
        },
    }


def translated(words: Any, table: dict[str, str], missing: set[str]) -> Any:
    """Return the same with every text translated; notes those that the table lacks."""
    if isinstance(words, dict):
        return {key: translated(value, table, missing) for key, value in words.items()}
    if words not in table:
        missing.add(words)
    return SPECIAL.sub(r"{'\g<0>'}", table.get(words, words))


def table_of(language: str) -> dict[str, str]:
    if language == "en":
        return {}
    return json.loads((Path(__file__).parent / "words" / f"{language}.json").read_text(encoding="utf-8"))


def files(object_info: Json, language: str) -> tuple[dict[str, Json], set[str]]:
    """Return the files of a language, and the texts it has no words for."""
    missing: set[str] = set()
    made = {name: translated(words, table_of(language), missing) for name, words in english(object_info).items()}
    return made, set() if language == "en" else missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_interface_speaks_a_language_wholly(server, language):
    made, missing = files(server.object_info(), language)
    assert not missing, f"add to tests/comfyui/words/{language}.json, then run python {Path(__file__).name}"
    for name, words in made.items():
        on_disk = json.loads((LOCALES / language / name).read_text(encoding="utf-8"))
        assert on_disk == words, f"locales/{language}/{name}: run python {Path(__file__).name}"


def test_every_input_and_output_says_what_it_is(server):
    """What stays hidden is there for old workflows only."""
    for name, node in our_nodes(server.object_info()).items():
        assert node["description"] and node["search_aliases"], name
        silent = [key for key, about in inputs_of(node["input"]).items() if not about.get("tooltip")]
        assert not silent, f"{name}: no tooltip on {silent}"
        assert all(node["output_tooltips"]), f"{name}: an output without a tooltip"


def page_of(name: str) -> Path:
    return ROOT / "web" / "docs" / f"{name}.md"


def sections(text: str) -> dict[str, str]:
    """Return heading -> text of a help page's sections."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {heading: body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def socket_sections(node: Json) -> dict[str, str]:
    """Return what a help page says of a node's inputs and outputs: what their tooltips say."""
    shown = {name: about for name, about in inputs_of(node["input"]).items() if not about.get("hidden")}
    inputs = [f"- **{name.replace('.', ' → ')}**: {_in_one_line(about['tooltip'])}" for name, about in shown.items()]
    outputs = [
        f"- **{name}** ({kind}): {_in_one_line(tooltip)}"
        for name, kind, tooltip in zip(node["output_name"], node["output"], node["output_tooltips"], strict=True)
    ]
    return {
        "Inputs": "\n".join(inputs) or "None.",
        "Outputs": "\n".join(outputs) or "None: the node shows what it has.",
    }


def _in_one_line(text: str) -> str:
    return "; ".join(text.splitlines())


def test_every_node_has_a_whole_help_page(server):
    for name, node in our_nodes(server.object_info()).items():
        text = page_of(name).read_text(encoding="utf-8")
        found = sections(text)
        assert {heading: found[heading] for heading in ("Inputs", "Outputs")} == socket_sections(node), name
        assert found["Example"] and found["Usual mistakes"].startswith("- "), name
        (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
        assert (page_of(name).parent / picture).stat().st_size < 60_000, name


def _write_page(name: str, node: Json) -> None:
    text = page_of(name).read_text(encoding="utf-8")
    for heading, body in socket_sections(node).items():
        text = re.sub(rf"(?ms)^## {heading}$.*?(?=^## )", lambda _, h=heading, b=body: f"## {h}\n\n{b}\n\n", text)
    page_of(name).write_text(text, encoding="utf-8")


def _write(info: Json) -> int:
    for name, node in our_nodes(info).items():
        _write_page(name, node)
    lacking = 0
    for language in LANGUAGES:
        made, missing = files(info, language)
        lacking += len(missing)
        for text in sorted(missing):
            sys.stderr.write(f"words/{language}.json lacks {json.dumps(text, ensure_ascii=False)}\n")
        for name, words in made.items():
            path = LOCALES / language / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(words, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return lacking


if __name__ == "__main__":
    with ComfyServer() as running:
        described = running.object_info()
    sys.exit(bool(_write(described)))
