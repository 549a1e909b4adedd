"""Any image classifier of transformers, with the labels that its user calls unsafe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from PIL import Image

from ...errors import InputError
from ...transformers_folder import check_loaded, config_of, weights_sha256
from .judge import Judge, JudgeKind, JudgeOptions, Rule, Scores


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class ClassifierOptions(JudgeOptions):
    folder: Path = pydantic.Field(description="Folder of the model: config.json, its preprocessor and safetensors.")
    unsafe_labels: Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_list), pydantic.Field(min_length=1)] = (
        pydantic.Field(description="The labels of the model that mean unsafe, with commas between, as it spells them.")
    )
    threshold: float = pydantic.Field(0.5, ge=0, le=1, description="Sum of their probabilities from which on unsafe.")


class Classifier:
    """Scores: unsafe label -> its probability."""

    batch_size = 16

    def __init__(self, options: ClassifierOptions, device: str):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = options.folder
        labels = {str(label): int(index) for index, label in (config_of(folder).id2label or {}).items()}
        if unknown := [label for label in options.unsafe_labels if label not in labels]:
            raise InputError(f"{folder}: has no label {unknown[0]!r}; its labels are {', '.join(labels)}")
        if len(set(options.unsafe_labels)) == len(labels):
            raise InputError(f"{folder}: every label is called unsafe; leave the safe ones out")
        self._labels = {label: labels[label] for label in dict.fromkeys(options.unsafe_labels)}
        self._device = device
        self._model = check_loaded(AutoModelForImageClassification, folder).to(device)
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder}: its image preprocessor cannot be loaded ({reason})") from error
        self.version = f"classifier {weights_sha256(folder)[:16]} labels {', '.join(self._labels)}"

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        pixels = self._processor([image.convert("RGB") for image in images], return_tensors="pt")
        found = self._model(pixels["pixel_values"].to(self._device)).logits.float().softmax(dim=-1).cpu()
        return [{label: float(row[index]) for label, index in self._labels.items()} for row in found]


def _load(options: ClassifierOptions, device: str) -> Judge:
    return Classifier(options, device)


def _is_unsafe(scores: Scores, options: ClassifierOptions, categories: Sequence[str]) -> bool:
    return sum(scores.values()) >= options.threshold


CLASSIFIER = JudgeKind(
    title="Image classifier",
    source_url="https://huggingface.co/models?pipeline_tag=image-classification",
    licence="the model's",
    summary="Any image-classification model of transformers, in a folder of your own.",
    needs="the model's folder: config.json, preprocessor_config.json, safetensors",
    rules={"threshold": Rule("P(unsafe labels) >= threshold", _is_unsafe)},
    load=_load,
    options=ClassifierOptions,
)
