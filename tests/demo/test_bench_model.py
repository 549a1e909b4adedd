"""The bench checkpoint: words planted where they are said to be, a layout that is read back from the weights."""

import pytest
import torch
from safety_experts.demo.bench_model import LAYOUT, tokenizer
from safety_experts.demo.toy_model import TOKEN_TABLE, plant_words, seeded_text_model
from safety_experts.errors import InputError
from safety_experts.models.unet_keys import infer_layout, to_ldm, unet_config
from safety_experts.toy import bench_world as world


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def planted(words):
    """Token tables before and after the bench's words are planted."""
    before = seeded_text_model()
    after = {TOKEN_TABLE: before[TOKEN_TABLE].clone()}
    plant_words(after, world.planted_words(), words)
    return before[TOKEN_TABLE], after[TOKEN_TABLE]


@pytest.mark.slow
def test_planted_words_lie_at_their_cosine_and_keep_the_length_of_the_name(words, planted):
    table = planted[1].double()
    for word, (near, cosine) in world.planted_words().items():
        ((token,), (other,)) = (words(text)["input_ids"][1:-1] for text in (word, near))
        assert torch.nn.functional.cosine_similarity(table[token], table[other], dim=0) == pytest.approx(
            cosine, abs=2e-3
        )
        assert table[token].norm() == pytest.approx(float(table[other].norm()), rel=2e-3)


@pytest.mark.slow
def test_nothing_but_planted_words_moves(words, planted):
    before, after = planted
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert sorted(moved) == sorted(words(word)["input_ids"][1] for word in world.planted_words())


@pytest.mark.slow
def test_third_names_places_and_grounds_are_words_of_their_own(words, planted):
    table = torch.nn.functional.normalize(planted[1].float(), dim=1)
    for entry in world.CATEGORIES.values():
        (mark,) = words(entry.mark)["input_ids"][1:-1]
        for word in (entry.names[2], entry.place, *world.NEUTRAL_PLACES, *world.GROUNDS):
            (token,) = words(word)["input_ids"][1:-1]
            assert abs(table[token] @ table[mark]) < 0.2


def test_a_word_of_several_tokens_is_refused(words):
    table = {TOKEN_TABLE: torch.zeros(1, 1)}
    with pytest.raises(InputError, match="'zigzag' has 2 tokens"):
        plant_words(table, {"zigzag": ("ring", 0.5)}, words)


def test_the_layout_is_read_back_from_the_weights():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(LAYOUT))
    shapes = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    assert infer_layout(to_ldm(shapes, LAYOUT)) == LAYOUT
    trained = sum(weight.numel() for name, weight in unet.named_parameters() if not name.startswith("time_embedding."))
    # At 4 bits a weight that is less than 14 MB, so that the file to ship stays below 16.
    assert trained < 28_000_000
