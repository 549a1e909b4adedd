"""FID as papers report it: torch-fidelity's Inception with weights of the user's, only from 2,048 pictures on.

The weights are published as a pickle, which stays closed: its tensors are read from safetensors, names as they were.
Distances to the base model's pictures are drift; to a folder of reference pictures they are quality.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..files import sha256_of_file
from ..preferences.images import read_image
from ..tensor_file import read_tensors
from .distances import FRECHET_MIN, frechet
from .plan import BASE, read_plan_json
from .quality import write_distances
from .samples import FILE_NAME, Sample, read_picture, read_samples
from .schema import DistanceRow

REFERENCE, METRIC = "reference", "fid"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_CONVERT = (
    "convert pt_inception-2015-12-05-6726825d.pth of torch-fidelity's releases: torch.load(…, weights_only=True) it "
    "yourself and save_file its tensors"
)


class Features(Protocol):
    """What turns pictures into features [n, d], float32 on the CPU; `version` names it in every number."""

    version: str
    batch_size: int

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray: ...


class Inception:
    """The 2048 pooled features of the Inception that FID is made with; pictures are resized as TensorFlow 1 did."""

    batch_size = 32

    def __init__(self, path: Path, device: str = "cpu"):
        """Load it.

        Raises:
            InputError: torch-fidelity is not installed, or the file holds other tensors.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError("FID needs torch-fidelity: pip install torch-fidelity") from error
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: Inception's weights are read from .safetensors; {_CONVERT}")
        tensors, _ = read_tensors(path)
        with tempfile.TemporaryDirectory() as folder:
            # It reads a pickle only; this one was written here.
            own = Path(folder) / "inception.pth"
            torch.save(dict(tensors), own)
            try:
                self._model: Any = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(own)
                )
            except RuntimeError as error:  # missing, unexpected or wrongly shaped tensors
                raise InputError(f"{path}: these are not the tensors of FID's Inception; {_CONVERT}") from error
        self._device = device
        self._model.to(device)
        name = f"inception-tf2015:{sha256_of_file(path)[:8]}"
        self.version = f"{name}|torch-fidelity {version('torch-fidelity')}|tf-bilinear"

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        found = []
        for image in images:  # each of its own size
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]  # [1, 3, h, w]
            found.append(self._model(pixels.to(self._device))[0].float().cpu().numpy()[0])
        return np.array(found)


@dataclass(frozen=True)
class Reference:
    """Pictures to hold an arm's against, in the order of their names."""

    paths: tuple[Path, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "Reference":
        """List the pictures of a folder.

        Raises:
            InputError: it holds none.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give one with reference pictures (.png, .jpg, .webp)")
        paths = tuple(path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _FORMATS)
        if not paths:
            raise InputError(f"{folder}: holds no pictures; give a folder with .png, .jpg or .webp files")
        return cls(paths)


def check_enough(num_safe: int, reference: Reference | None) -> None:
    """Check before anything is drawn that FID will be able to say something.

    Args:
        num_safe: pictures of safe prompts that every arm will have.

    Raises:
        InputError: they are too few, or the reference has fewer.
    """
    if num_safe < FRECHET_MIN:
        raise InputError(
            f"FID needs {FRECHET_MIN} pictures of safe prompts an arm, here are {num_safe}: below, its bias is larger "
            "than what it is to show; leave out --inception (KID and CMMD need no such number), or give more prompts"
        )
    if reference and len(reference.paths) < num_safe:
        raise InputError(
            f"FID compares as many pictures of both: an arm has {num_safe}, the reference folder "
            f"{len(reference.paths)}; give more pictures"
        )


def measure_fid(
    folder: Path,
    features: Features,
    reference: Reference | None = None,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Add the FID of every arm's safe pictures to distances.json; False when it was stopped.

    Raises:
        InputError: the folder holds no evaluation, a picture is missing or broken, or they are too few.
    """
    samples = [sample for sample in read_samples(folder / FILE_NAME) if sample.kind == "safe"]
    latest = {sample.key: sample for sample in samples}
    by_arm: dict[str, list[Sample]] = {}
    for sample in latest.values():
        by_arm.setdefault(sample.arm, []).append(sample)
    count = len(by_arm.get(BASE, []))
    check_enough(count, reference)
    chosen = list(reference.paths[:count]) if reference else []
    sources: list[Sample | Path] = [*latest.values(), *chosen]
    total, done = len(sources), 0
    found: list[np.ndarray] = []
    for start in range(0, total, features.batch_size):
        if should_stop():
            return False
        images = [
            _read(source) if isinstance(source, Path) else read_picture(folder, source)
            for source in sources[start : start + features.batch_size]
        ]
        found.append(features.embed_images(images))
        done += len(images)
        on_progress(done, total)
    everything = np.concatenate(found)
    by_key = dict(zip(latest, everything, strict=False))
    arms = [arm["id"] for arm in read_plan_json(folder)["arms"] if arm["id"] in by_arm]
    vectors = {arm: {sample.pair_key: by_key[sample.key] for sample in by_arm[arm]} for arm in arms}
    rows = fid_rows(vectors, features.version, everything[len(latest) :], _digest(chosen))
    write_distances(folder, rows, {METRIC})
    return True


def fid_rows(
    vectors: Mapping[str, Mapping[tuple, np.ndarray]], extractor: str, reference: np.ndarray, digest: str
) -> list[DistanceRow]:
    """Return each arm's FID to the base model's pictures of the same prompts, and to the reference's as many.

    Args:
        vectors: arm -> picture -> features.
        reference: [n, d]; empty for none.
        digest: of the reference.
    """
    rows = []
    base = vectors[BASE]
    for arm, of_arm in vectors.items():
        shared = [key for key in of_arm if key in base]
        n = len(shared)
        if n < FRECHET_MIN:
            continue
        after, before = (np.array([found[key] for key in shared]) for found in (of_arm, base))
        pairs = [(BASE, before, BASE)] if arm != BASE else []
        pairs += [(REFERENCE, reference[:n], f"ref {digest}")] if len(reference) >= n else []
        for against, other, name in pairs:
            rows.append(
                DistanceRow(
                    arm=arm,
                    against=against,
                    metric=METRIC,
                    variant=f"fid:{extractor}|n {n}/{n}|{name}",
                    n=n,
                    value=frechet(after, other),
                    low=None,
                    high=None,
                )
            )
    return rows


def _read(path: Path) -> Image.Image:
    return read_image(path, (_FORMATS[path.suffix.lower()],), follow_links=True)


def _digest(paths: Sequence[Path]) -> str:
    """Return eight digits that tell one reference from another."""
    return hashlib.sha256("".join(sha256_of_file(path) for path in paths).encode()).hexdigest()[:8]
