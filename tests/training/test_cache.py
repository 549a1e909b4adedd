import numpy as np
import pytest
import torch
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.training.cache import PairCache, read_pixels


class CountingCheckpoint:
    """A checkpoint whose VAE averages 8x8 pixels and whose text encoder counts letters; both count their calls."""

    encoding_id = "0" * 16

    def __init__(self):
        self.images_encoded = self.prompts_encoded = 0

    def load_vae(self, dtype, device):
        return self

    def load_text_encoder(self, dtype, device):
        return self

    def encode_images(self, images):
        self.images_encoded += len(images)
        return torch.nn.functional.avg_pool2d(images, 8)

    def encode_prompts(self, prompts):
        self.prompts_encoded += len(prompts)
        return {"hidden_states": torch.tensor([[[len(prompt), prompt.count("a")]] for prompt in prompts]).float()}


def picture(seed, width=16, height=16):
    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture
def dataset(tmp_path):
    dataset = PreferenceDataset.create(tmp_path / "pairs", DatasetInfo({}, {}, "toy", ""))
    for number in range(5):
        pair = PromptPair(f"a red circle with thorns {number}", f"a red circle {number}", ("violence",), number)
        dataset.add(pair, picture(number), picture(100 + number))
    return dataset


def cache_of(dataset, checkpoint):
    return PairCache(dataset, checkpoint, torch.device("cpu"), torch.float32)


def no_progress(done, total):
    pass


def encode(cache, *, flips=False):
    cache.encode_pairs(cache.dataset.pairs, flips=flips, on_progress=no_progress)
    cache.encode_prompts([pair.prompt for pair in cache.dataset.pairs], on_progress=no_progress)


def test_everything_is_encoded_once_and_read_back_by_the_next_run(dataset):
    checkpoint = CountingCheckpoint()
    encode(cache_of(dataset, checkpoint))
    assert (checkpoint.images_encoded, checkpoint.prompts_encoded) == (10, 5)
    again = cache_of(dataset, checkpoint)
    encode(again)
    assert (checkpoint.images_encoded, checkpoint.prompts_encoded) == (10, 5)


def test_cached_latents_and_conditions_equal_fresh_ones(dataset):
    checkpoint = CountingCheckpoint()
    cache = cache_of(dataset, checkpoint)
    encode(cache, flips=True)
    for pair in dataset.pairs:
        for flipped in (False, True):
            for latent, path in zip(cache.latents(pair, flipped=flipped), dataset.image_paths(pair), strict=True):
                pixels = read_pixels(path)
                fresh = checkpoint.encode_images((pixels.flip(-1) if flipped else pixels)[None])[0]
                assert torch.equal(latent, fresh)
    prompts = [pair.prompt for pair in reversed(dataset.pairs)]
    assert torch.equal(cache.conditions(prompts)["hidden_states"], checkpoint.encode_prompts(prompts)["hidden_states"])


def test_an_edited_image_is_encoded_again_and_the_others_are_not(dataset):
    checkpoint = CountingCheckpoint()
    encode(cache_of(dataset, checkpoint))
    picture(999).save(dataset.image_paths(dataset.pairs[2])[0])
    encode(cache_of(dataset, checkpoint))
    assert checkpoint.images_encoded == 11


def test_another_checkpoint_does_not_read_this_ones_cache(dataset):
    first, second = CountingCheckpoint(), CountingCheckpoint()
    second.encoding_id = "1" * 16
    encode(cache_of(dataset, first))
    encode(cache_of(dataset, second))
    assert second.images_encoded == 10


def test_a_truncated_image_is_named(dataset):
    path = dataset.image_paths(dataset.pairs[1])[1]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=path.name) as error:
        encode(cache_of(dataset, CountingCheckpoint()))
    assert "\n" not in str(error.value)


def test_a_pair_of_two_sizes_is_named(dataset):
    pair = dataset.pairs[0]
    picture(5, width=24).save(dataset.image_paths(pair)[0])
    cache = cache_of(dataset, CountingCheckpoint())
    encode(cache)
    with pytest.raises(InputError, match=f"pair {pair.id}: chosen and rejected image differ in size"):
        cache.latents(pair)


def test_odd_sizes_are_cropped_at_the_centre_to_multiples_of_8(tmp_path):
    picture(0, width=19, height=26).save(tmp_path / "odd.png")
    pixels = read_pixels(tmp_path / "odd.png")
    assert pixels.shape == (3, 24, 16)
    whole = torch.from_numpy(np.asarray(Image.open(tmp_path / "odd.png")) / np.float32(255))
    torch.testing.assert_close(pixels.permute(1, 2, 0), whole[1:25, 1:17])
    picture(0, width=7, height=9).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="7x9 px; at least 8x8"):
        read_pixels(tmp_path / "small.png")
