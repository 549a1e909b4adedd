"""OneTrainer: the rejected image beside its better one, told apart by a suffix of the file name."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ..dataset import PreferenceDataset, PreferencePair
from .folders import copy_image, images_of, read_caption, read_our_fields, write_our_fields
from .format import Format, FoundPair, Source, image_file, number_names, our_fields

_SUFFIX = "-rejectedlabel"


def _read(source: Source) -> Iterator[FoundPair]:
    folder = source.path
    images = images_of(folder, "give the folder of the images")
    ours = read_our_fields(folder)
    num_found = 0
    for stem in [stem for stem in images if not stem.endswith(_SUFFIX)]:
        where = str(folder / images[stem])
        if stem + _SUFFIX not in images:
            source.skip("image without its rejected one")
            continue
        num_found += 1
        chosen, rejected = (image_file(folder, images[name], where) for name in (stem, stem + _SUFFIX))
        prompt = read_caption((folder / f"{stem}.txt",), where)
        yield source.pair(prompt, chosen, rejected, where, ours.get(stem))
    if not num_found:
        raise InputError(f"{folder}: no image has its rejected one beside it, named …{_SUFFIX}; check the names")


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    for name, pair in number_names(pairs):
        for path, target in zip(dataset.image_paths(pair), (f"{name}.png", f"{name}{_SUFFIX}.png"), strict=True):
            copy_image(path, folder, target)
        (folder / f"{name}.txt").write_text(pair.prompt, encoding="utf-8", newline="")
    write_our_fields(folder, ((name, our_fields(pair)) for name, pair in number_names(pairs)))


FORMAT = Format(
    title="OneTrainer",
    layout=f"sample.png, sample{_SUFFIX}.png and the caption sample.txt in one folder",
    published="Nerogar/OneTrainer issue 1403",
    read=_read,
    write=_write,
)
