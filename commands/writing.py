"""`safety-experts dataset write`: prompt pairs from a few words a category, or the safe side of unsafe prompts."""

import argparse
from pathlib import Path

from ..errors import InputError
from .progress import progress_bar


def add_arguments(verbs) -> None:
    """Declare the verb `write` among those of `dataset`."""
    text = "let a language model that you run write prompt pairs, or the safe side of unsafe prompts"
    writing = verbs.add_parser("write", help=text, description=text)
    source = writing.add_mutually_exclusive_group(required=True)
    source.add_argument("--concepts", type=Path, metavar="FILE", help="YAML: a list of concepts for each category")
    source.add_argument("--unsafe", type=Path, metavar="FILE", help="unsafe prompts: .txt, one a line, or .csv (I2P's)")
    writing.add_argument("--category", default="", metavar="C[,C…]", help="of the prompts in a .txt file")
    writing.add_argument("--number", type=int, default=10, metavar="N", help="pairs for each concept (default: 10)")
    writing.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder; prompt_pairs.jsonl is continued"
    )
    writing.add_argument(
        "--url", default="http://127.0.0.1:11434/v1", help="OpenAI-compatible address (default: Ollama's)"
    )
    writing.add_argument("--model", metavar="NAME", help="name of a model that the server has")
    writing.add_argument("--local", type=Path, metavar="DIR", help="instead of a server: a transformers folder")
    writing.add_argument(
        "--allow-remote", action="store_true", help="send the request to another machine than this one"
    )
    writing.add_argument("--template", type=Path, metavar="FILE", help="request of your own (default: the shipped one)")
    writing.add_argument(
        "--retries", type=int, default=2, metavar="N", help="times an invalid answer is asked for again"
    )
    writing.add_argument("--tokenizer", type=Path, metavar="DIR", help="CLIP's, to refuse prompts it would cut off")
    writing.add_argument("--device", help="torch device for --local (default: a GPU where there is one)")
    writing.add_argument("--json", action="store_true", help="print the result as JSON")
    writing.set_defaults(work=_write)


def _write(arguments: argparse.Namespace) -> None:
    from ..files import check_usable
    from ..preferences.records import refuse_links
    from ..preferences.writing import Checks, read_template, to_json, write_pairs, write_safe_sides

    if bool(arguments.model) == bool(arguments.local):
        raise InputError("name either --model, which the server at --url has, or --local DIR")
    check_usable(arguments.out)
    refuse_links(arguments.out)
    out = arguments.out / "prompt_pairs.jsonl"
    fields = ("category", "concept", "number") if arguments.concepts else ("category", "prompt")
    template = read_template(arguments.template, fields) if arguments.template else None
    count_tokens = _token_counter(arguments.tokenizer) if arguments.tokenizer else None
    options = {"template": template, "retries": arguments.retries}
    if arguments.concepts:
        concepts = _read_concepts(arguments.concepts)
        model = _model(arguments)
        with progress_bar("pairs", is_hidden=arguments.json) as show:
            written = write_pairs(
                model,
                concepts,
                out,
                number=arguments.number,
                checks=Checks(count_tokens),
                on_progress=show,
                **options,
            )
    else:
        from ..preferences.unsafe_prompts import read_unsafe_prompts

        prompts = read_unsafe_prompts(arguments.unsafe, arguments.category)
        model = _model(arguments)
        with progress_bar("prompts", is_hidden=arguments.json) as show:
            written = write_safe_sides(
                model, prompts, out, checks=Checks(count_tokens, near=1.01), on_progress=show, **options
            )
    if arguments.json:
        print(to_json(written))
        return
    print(f"{out}: {len(written.pairs)} prompt pairs")
    for problem, count in written.refused.most_common():
        print(f"left out: {count}, {problem}")
    for what, count in written.missing.items():
        print(f"not written: {count} for {what}")


def _model(arguments: argparse.Namespace):
    if arguments.local:
        from ..devices import choose_device
        from ..preferences.local_model import LocalModel

        return LocalModel(arguments.local, str(choose_device(arguments.device)))
    from ..endpoint import Endpoint

    return Endpoint(arguments.url, arguments.model, arguments.allow_remote)


def _token_counter(folder: Path):
    from ..models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text)["input_ids"]) - 2  # without its start and end


def _read_concepts(path: Path) -> dict[str, list[str]]:
    from ..plain_yaml import load_yaml
    from ..preferences.writing import check_concepts

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: cannot be read; give a YAML file in UTF-8") from None
    return check_concepts(load_yaml(text, str(path)), str(path))
