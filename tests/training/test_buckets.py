"""Aspect-ratio buckets against worked numbers."""

import numpy as np
import pytest
from PIL import Image
from safety_experts.training.buckets import bucket_of, fit_bucket
from safety_experts.training.cache import read_pixels


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1024, 1024), 512, (512, 512)),
        ((1024, 768), 512, (576, 448)),  # 1.286, nearer to 4:3 than 640x384 (1.667) or 512x512
        ((768, 1024), 512, (448, 576)),
        ((1920, 1080), 1024, (1344, 768)),  # 1.75 against 16:9 = 1.778
        ((4000, 100), 512, (2560, 64)),
        ((512, 512), 512, (512, 512)),
        ((400, 300), 512, (400, 300)),  # nothing is enlarged
    ],
)
def test_buckets_are_the_nearest_shape_of_the_area(size, resolution, expected):
    assert bucket_of(*size, resolution) == expected


def test_every_bucket_keeps_the_area_and_the_shape():
    for width in range(600, 2400, 135):
        for height in range(600, 2400, 175):
            found_width, found_height = bucket_of(width, height, 512)
            assert found_width % 64 == found_height % 64 == 0
            assert found_width * found_height <= 512**2
            assert (
                abs(np.log(found_width / found_height / (width / height))) < 0.3
            )  # a step of 64 px is large beside the short side of a long image


def test_an_image_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path):
    columns = np.tile(
        (np.arange(800) // 4).astype(np.uint8)[None, :, None], (400, 1, 3)
    )  # brightness grows to the right
    fitted = fit_bucket(Image.fromarray(columns), 256)
    assert fitted.size == bucket_of(800, 400, 256) == (320, 192)
    row = np.asarray(fitted)[96, :, 0].astype(int)
    assert abs(row + row[::-1] - 199).max() <= 3  # as much lost on the left as on the right
    Image.fromarray(columns).save(tmp_path / "wide.png")
    assert read_pixels(tmp_path / "wide.png", 256).shape == (3, 192, 320)
    assert read_pixels(tmp_path / "wide.png").shape == (3, 400, 800)
