"""Layouts and names of Stable Diffusion UNets, against diffusers' own converter and the published sizes."""

import pytest
import torch
from safety_experts.models.unet import build_unet
from safety_experts.models.unet_keys import UNetLayout, infer_layout, rename, to_diffusers, to_ldm

SD15 = UNetLayout(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    input_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    output_depths=((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    middle_depth=1,
    context_dim=768,
)
SD21 = UNetLayout(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    input_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    output_depths=((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    middle_depth=1,
    context_dim=1024,
    linear_projections=True,
)
SDXL = UNetLayout(
    model_channels=320,
    channel_mult=(1, 2, 4),
    input_depths=((0, 0), (2, 2), (10, 10)),
    output_depths=((0, 0, 0), (2, 2, 2), (10, 10, 10)),
    middle_depth=10,
    context_dim=2048,
    linear_projections=True,
    vector_dim=2816,
)
SSD1B = UNetLayout(
    model_channels=320,
    channel_mult=(1, 2, 4),
    input_depths=((0, 0), (2, 2), (4, 4)),
    output_depths=((0, 0, 0), (2, 1, 1), (4, 4, 10)),
    middle_depth=0,
    context_dim=2048,
    linear_projections=True,
    vector_dim=2816,
)
TOY = UNetLayout(
    model_channels=320,
    channel_mult=(1,),
    input_depths=((1,),),
    output_depths=((1, 1),),
    middle_depth=None,
    context_dim=768,
)
PATCHY = UNetLayout(
    model_channels=32,
    channel_mult=(1, 2),
    input_depths=((1, 0), (0, 0)),
    output_depths=((0, 1, 0), (0, 0, 2)),
    middle_depth=3,
    context_dim=768,
)
LAYOUTS = {"SD1.5": SD15, "SD2.1": SD21, "SDXL": SDXL, "SSD-1B": SSD1B, "toy": TOY, "patchy": PATCHY}


@pytest.fixture(scope="module")
def states():
    return {name: build_unet(layout).state_dict() for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_back_from_the_names_and_shapes_it_gives(name, states):
    ldm = to_ldm(states[name], LAYOUTS[name])
    assert infer_layout({key: tuple(value.shape) for key, value in ldm.items()}) == LAYOUTS[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_renaming_there_and_back_is_the_identity(name, states):
    ldm = to_ldm(states[name], LAYOUTS[name])
    assert len(ldm) == len(states[name])
    assert list(to_diffusers(ldm, LAYOUTS[name])) == list(states[name])


@pytest.mark.parametrize(
    ("name", "published"), [("SD1.5", 859_520_964), ("SD2.1", 865_910_724), ("SDXL", 2_567_463_684)]
)
def test_full_models_have_the_published_number_of_parameters(name, published, states):
    assert sum(value.numel() for value in states[name].values()) == published


@pytest.mark.parametrize("name", ["SD1.5", "SD2.1", "SDXL", "SSD-1B", "toy"])
def test_names_agree_with_diffusers_own_converter(name, states):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    numbered = {key: torch.tensor(index) for index, key in enumerate(states[name])}
    ldm = {f"model.diffusion_model.{key}": value for key, value in to_ldm(numbered, LAYOUTS[name]).items()}
    config = {"layers_per_block": len(LAYOUTS[name].input_depths[0])}
    if LAYOUTS[name].vector_dim:
        config["addition_embed_type"] = "text_time"
    assert convert_ldm_unet_checkpoint(ldm, config) == numbered


def test_other_architectures_have_no_layout():
    assert infer_layout({"double_blocks.0.img_attn.qkv.weight": (384, 128)}) is None
    assert infer_layout({"input_blocks.0.0.weight": (320, 4, 3, 3)}) is None


def test_renaming_takes_the_longest_known_prefix_of_whole_words():
    names = {"a": "x", "a.b": "y"}
    assert rename("a.b.weight", names) == "y.weight"
    assert rename("a.bc.weight", names) == "x.bc.weight"
    with pytest.raises(KeyError):
        rename("d.weight", names)
