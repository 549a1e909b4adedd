"""What every image mode becomes, against Pillow's documentation and sums done by hand."""

import numpy as np
import pytest
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.preferences.images import read_image


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_sixteen_bit_grey_is_scaled_not_cut_off(tmp_path):
    values = np.array([[0, 257, 32896, 65535, 65406, 128]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(values))
    read = read_image(path)
    assert read.mode == "RGB"
    assert np.asarray(read)[0, :, 0].tolist() == [0, 1, 128, 255, 254, 0]  # v / 257, rounded: 65406 / 257 = 254.498
    assert np.ptp(np.asarray(read), axis=-1).max() == 0


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (8, 16), (200, 0, 0))
    picture.paste((0, 0, 200), (0, 0, 8, 8))  # blue above red
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned 90° clockwise: what is above comes to the right
    for name, options in (("a.jpg", {"quality": 95}), ("a.png", {})):
        read = read_image(saved(tmp_path, picture, name, exif=exif, **options), ("PNG", "JPEG"))
        assert read.size == (16, 8)
        left, right = read.getpixel((2, 4)), read.getpixel((13, 4))
        assert left[0] > 150 > left[2] and right[2] > 150 > right[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    colour = (100, 40, 0, 0) if mode == "RGBA" else (100, 0)
    picture = Image.new(mode, (3, 1), colour)
    picture.putpixel((1, 0), (*colour[:-1], 255))
    picture.putpixel((2, 0), (*colour[:-1], 128))
    read = np.asarray(read_image(saved(tmp_path, picture)))[0]
    opaque = [100, 40, 0] if mode == "RGBA" else [100] * 3
    assert read[0].tolist() == [255] * 3 and read[1].tolist() == opaque
    half = [value * 128 / 255 + 255 * 127 / 255 for value in opaque]
    assert np.abs(read[2] - np.array(half)).max() <= 1


def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path):
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    assert np.asarray(read_image(saved(tmp_path, picture)))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert np.asarray(read_image(saved(tmp_path, picture, transparency=0)))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_one_bit_and_grey_become_rgb(tmp_path):
    assert read_image(saved(tmp_path, Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(saved(tmp_path, Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)


def test_what_cannot_be_read_rightly_is_refused_by_name(tmp_path):
    cmyk = saved(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 0, 0)), "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg: mode CMYK is not read"):
        read_image(cmyk, ("JPEG",))
    frames = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(2)]
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"b\.png: has 2 frames"):
        read_image(tmp_path / "b.png")
