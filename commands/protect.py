"""`safety-experts protect`: how much a style LoRA works against safety experts, and a style LoRA that does not."""

import argparse
import json
from pathlib import Path

from .outputs import check_out
from .progress import progress_bar

HELP = "report how much a style LoRA cancels safety experts, and write one that does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("style", metavar="STYLE", help="style LoRA in any common spelling")
    parser.add_argument(
        "--expert",
        action="append",
        required=True,
        metavar="EXPERT",
        help="safety expert or merge to protect; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="protected style to write (default: only report)")
    parser.add_argument(
        "--space",
        default="output",
        choices=("output", "input", "both"),
        help="remove what writes where the experts write, reads where they read, or both (default: output)",
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="S", help="0 removes nothing, 1 all (default: 1)"
    )
    parser.add_argument("--report", action="store_true", help="print every layer, not only the sum")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out:
        check_out(arguments)

    from ..experts.expert_file import load_expert, save_expert
    from ..experts.overlap import overlap, overlap_table, total
    from ..experts.protection import kept_energy, protect

    style = load_expert(arguments.style)
    experts = [load_expert(path) for path in arguments.expert]
    overlaps = [overlap(expert, style) for expert in experts]
    with progress_bar("layers") as show:
        protected = protect(
            style,
            experts,
            space=arguments.space,
            strength=arguments.strength,
            name=arguments.out.stem if arguments.out else None,
            on_layer=show,
        )
    kept = kept_energy(style, protected)
    if arguments.out:
        save_expert(protected, arguments.out)
    if arguments.json:
        report = [
            {
                "expert": expert.name,
                "all": total(found.values()).to_json(),
                "layers": {name: item.to_json() for name, item in found.items()},
            }
            for expert, found in zip(experts, overlaps, strict=True)
        ]
        written = str(arguments.out) if arguments.out else None
        print(json.dumps({"protected": written, "kept_energy": round(kept, 6), "overlaps": report}))
        return
    for expert, found in zip(experts, overlaps, strict=True):
        print(overlap_table(expert, style, found, list(found) if arguments.report else ()))
    if arguments.out:
        print(f"{arguments.out}: {kept:.2%} of the style kept")
    else:
        print(f"a protected style would keep {kept:.2%} of it; write it with --out FILE.safetensors")
