"""Verifier heads as a judge: what `SafetyExpertsTrainVerifier` and `safety-experts verifier train` fit."""

from collections.abc import Sequence
from pathlib import Path

import pydantic
import torch
from PIL import Image

from ...errors import InputError
from ...files import sha256_of_file
from ...guards.verifier import Verifier, fit_verifier, read_verifier
from ...preferences.dataset import PreferenceDataset
from ...preferences.images import read_image
from .clip_encoder import ClipEncoder, shared_folder
from .judge import Judge, JudgeKind, JudgeOptions, Rule, Scores
from .q16_vectors import probe_image


class VerifierOptions(JudgeOptions):
    folder: Path | None = pydantic.Field(
        None, description="Transformers folder of the CLIP it was fitted with; in the graph CLIP_VISION instead."
    )
    file: Path = pydantic.Field(description="The verifier (.safetensors): Train Verifier, or safety-experts verifier.")


class VerifierJudge:
    """Scores: category -> log-odds minus the head's threshold, above 0 unsafe."""

    def __init__(self, encoder: ClipEncoder, verifier: Verifier, version: str):
        verifier.check_clip(encoder.embed_images([probe_image()])[0])
        self._encoder, self._verifier, self.batch_size = encoder, verifier, encoder.batch_size
        self.version = f"verifier {version} {encoder.version}"

    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        scores = self._verifier.scores(self._encoder.embed_images(images))
        return [dict(zip(self._verifier.categories, map(float, row), strict=True)) for row in scores]


def load_verifier_judge(encoder: ClipEncoder, file: Path) -> VerifierJudge:
    """Return the judge of a file.

    Raises:
        InputError: the file is no verifier, or was fitted with another CLIP.
    """
    return VerifierJudge(encoder, read_verifier(file), sha256_of_file(file)[:16])


def train_verifier(
    encoder: ClipEncoder,
    dataset: PreferenceDataset,
    false_positive_rate: float,
    num_pairs: int | None = None,
    on_progress=lambda done, total: None,
) -> Verifier:
    """Fit a verifier to a dataset: rejected pictures show their pair's categories, chosen ones none.

    A flipped pair counts the other way round and a dropped one not at all, as in training. Pictures that a judge or a
    reviewer flagged otherwise (`chosen_unsafe`, `rejected_unsafe`) are left out.

    Args:
        num_pairs: at most so many of each category; None for all.

    Raises:
        InputError: there are too few pictures of a category.
    """
    counts: dict[str, int] = {}
    pairs = []
    for pair in dataset.training_pairs():
        if num_pairs is None or any(counts.get(name, 0) < num_pairs for name in pair.categories):
            pairs.append(pair)
            for name in pair.categories:
                counts[name] = counts.get(name, 0) + 1
    images, shown, groups = [], [], []
    for pair in pairs:
        chosen, rejected = dataset.image_paths(pair)
        # Pairs of one prompt show one scene: they are held out together.
        for path, categories, is_as_labelled in (
            (chosen, frozenset(), pair.chosen_unsafe is not True),
            (rejected, frozenset(pair.categories), pair.rejected_unsafe is not False),
        ):
            if is_as_labelled:
                images.append(path)
                shown.append(categories)
                groups.append(pair.safe_prompt or pair.prompt)
    features = []
    for start in range(0, len(images), encoder.batch_size):
        batch = images[start : start + encoder.batch_size]
        features.append(encoder.embed_images([read_image(path) for path in batch]))
        on_progress(start + len(batch), len(images))
    probe = encoder.embed_images([probe_image()])[0]
    return fit_verifier(torch.cat(features), shown, groups, probe, encoder.version, false_positive_rate)


def _load(options: VerifierOptions, device: str) -> Judge:
    if options.folder is None:
        raise InputError("verifier needs the CLIP it was fitted with: set its folder, or in the graph connect it")
    return load_verifier_judge(shared_folder(options.folder, device), options.file)


def _any(scores: Scores, options: VerifierOptions, categories: Sequence[str]) -> bool:
    return any(score > 0 for score in scores.values())


def _own(scores: Scores, options: VerifierOptions, categories: Sequence[str]) -> bool | None:
    known = [scores[category] > 0 for category in categories if category in scores]
    return any(known) if known else None


VERIFIER = JudgeKind(
    title="Verifier",
    source_url="https://github.com/safety-experts/safety-experts",
    licence="Apache-2.0; the CLIP's",
    summary="One small head a category on CLIP image features, fitted to the pictures of your own dataset; it knows "
    "what those look like, and should not judge the experts that were trained on them alone.",
    needs="a verifier file; CLIP Vision in the graph, or a transformers folder",
    rules={
        "any-category": Rule("any head is above its threshold", _any),
        "own-category": Rule("the head of one of its categories is above its threshold", _own),
    },
    load=_load,
    options=VerifierOptions,
)
