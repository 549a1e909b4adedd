import pytest
from PIL import Image
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair


@pytest.fixture
def make_pair():
    """make_pair(i) -> the i-th prompt pair of the toy world."""

    def make(index: int, category: str = "violence") -> PromptPair:
        return PromptPair(f"a red circle {index} with thorns", f"a red circle {index}", (category,), index, "toy")

    return make


@pytest.fixture
def draw():
    """draw(i) -> (chosen, rejected), two different 4×3 images."""

    def make(index: int) -> tuple[Image.Image, Image.Image]:
        return Image.new("RGB", (4, 3), (index % 256, 200, 0)), Image.new("RGB", (4, 3), (index % 256, 0, 200))

    return make


@pytest.fixture
def info() -> DatasetInfo:
    checkpoint = {"name": "toy.safetensors", "sha256": "ab" * 32, "family": "sd15"}
    return DatasetInfo(checkpoint, {"sampler": "euler", "steps": 20, "cfg": 7.5}, "toy taxonomy", "CC0")


@pytest.fixture
def dataset(tmp_path, info, make_pair, draw) -> PreferenceDataset:
    """A dataset of four pairs: three of violence and one of hate."""
    made = PreferenceDataset.create(tmp_path / "toy", info)
    for index in range(4):
        made.add(make_pair(index, "hate" if index == 3 else "violence"), *draw(index))
    return made
