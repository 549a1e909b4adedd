"""Datasets from images that exist already."""

from pathlib import Path

from ..errors import InputError
from ..files import check_usable, path_inside
from .dataset import PreferenceDataset
from .images import read_image
from .inspection import Progress
from .prompt_csv import read_coprov2
from .records import DatasetInfo


def import_coprov2(
    csv_path: Path, images_folder: Path, dataset_folder: Path, on_progress: Progress | None = None
) -> PreferenceDataset:
    """Make a preference dataset of a CoProV2 CSV and the `u_`/`s_` images it names; killed, it continues where it was.

    Args:
        csv_path: columns `prompt,image,category`.
        images_folder: holds the images under the names of the `image` column, PNG or JPEG.
        on_progress: called with (pairs done, pairs in all).

    Raises:
        InputError: the CSV is wrong, or an image is missing, damaged or not of its partner's size, naming the file.
    """
    check_usable(images_folder)
    found = read_coprov2(csv_path)
    if not images_folder.is_dir():
        raise InputError(f"no images folder {images_folder}; check the name")
    info = DatasetInfo({}, {}, csv_path.name, f"imported; the licence of {csv_path.name} and its images applies")
    dataset = PreferenceDataset.create(dataset_folder, info)
    for number, entry in enumerate(found, start=1):
        if entry.pair.id not in dataset.ids:
            names = (entry.safe_image, entry.unsafe_image)
            chosen, rejected = (
                read_image(path_inside(images_folder, name), ("PNG", "JPEG"), follow_links=True) for name in names
            )
            dataset.add(entry.pair, chosen, rejected)
        if on_progress:
            on_progress(number, len(found))
    return dataset
