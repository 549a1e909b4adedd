import json

import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert
from safety_experts.experts.keys import comfyui_matches, kohya_name

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
INNER = "transformer_blocks.0.attn1.to_q"
TEXT_PATH = "text_model.encoder.layers.0.self_attn.q_proj"
JOINT = "lora_transformer_transformer_blocks_0_attn_to_q"
SINGLE = "lora_transformer_single_transformer_blocks_3_proj_out"


def read(*stems, metadata=None, rank=4):
    """Read tensors under `<stem with {} for the part>`; each stem is (down key, up key)."""
    tensors = {}
    for down, up in stems:
        tensors[down] = torch.randn(rank, 6)
        tensors[up] = torch.randn(5, rank)
    return Expert.from_state_dict(tensors, metadata, "file.safetensors")


def test_kohya_name_of_a_diffusers_path():
    assert kohya_name(PATH) == NAME
    assert kohya_name("single_transformer_blocks.3.proj_out") == SINGLE
    assert kohya_name(TEXT_PATH, "lora_te1") == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        (f"{NAME}.lora_{{}}.weight", NAME),
        (f"unet.{PATH}.lora_{{}}.weight", NAME),
        (f"unet.{PATH}.lora.{{}}.weight", NAME),
        (f"{PATH.replace('.to_q', '.processor.to_q')}_lora.{{}}.weight", NAME),
        (f"unet.{PATH.replace('.to_q', '.processor.to_q')}_lora.{{}}.weight", NAME),
        (f"unet.{PATH.replace('.to_q', '.processor.to_out')}_lora.{{}}.weight", NAME[:-1] + "out_0"),
        (f"lycoris_{NAME[10:]}.lora_{{}}.weight", NAME),
        (f"diffusion_model.input_blocks.1.1.{INNER}.lora_{{}}.weight", NAME),
        (f"lora_unet_input_blocks_1_1_{INNER.replace('.', '_')}.lora_{{}}.weight", NAME),
        (f"text_encoder.{TEXT_PATH}.lora_linear_layer.{{}}.weight", kohya_name(TEXT_PATH, "lora_te")),
        (f"lora_te2_{TEXT_PATH.replace('.', '_')}.lora_{{}}.weight", kohya_name(TEXT_PATH, "lora_te2")),
        (f"{JOINT}.lora_{{}}.weight", JOINT),
        (f"lycoris_{JOINT[17:]}.lora_{{}}.weight", JOINT),
        (f"lora_unet_{JOINT[17:]}.lora_{{}}.weight", f"lora_unet_{JOINT[17:]}"),  # Qwen-Image's own name
        (f"diffusion_model.{INNER.replace('attn1', 'attn')}.lora_{{}}.weight", f"lora_unet_{JOINT[17:]}"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", "lora_unet_double_blocks_0_img_attn_qkv"),
    ],
)
def test_down_up_spellings_give_the_kohya_name(stem, name):
    expert = read((stem.format("down"), stem.format("up")))
    assert list(expert.layers) == [name]
    assert expert.layers[name].down.shape == (4, 6)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        (f"unet.{PATH}.lora_{{}}.weight", NAME),
        (f"unet.{PATH}.lora_{{}}.default.weight", NAME),
        (f"base_model.model.{PATH}.lora_{{}}.weight", NAME),
        (f"unet.base_model.model.{PATH}.lora_{{}}.weight", NAME),
        (f"{PATH}.lora_{{}}.weight", NAME),
        (f"base_model.model.{TEXT_PATH}.lora_{{}}.weight", kohya_name(TEXT_PATH, "lora_te")),
        ("transformer.transformer_blocks.0.attn.to_q.lora_{}.weight", JOINT),
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_{}.weight", JOINT),
        ("transformer_blocks.0.attn.to_q.lora_{}.default.weight", JOINT),
        ("transformer.single_transformer_blocks.3.proj_out.lora_{}.weight", SINGLE),
    ],
)
def test_a_b_spellings_give_the_kohya_name(stem, name):
    assert list(read((stem.format("A"), stem.format("B"))).layers) == [name]


@pytest.mark.parametrize(
    ("native", "diffusers"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_4_0_in_layers_2", "down_blocks_1_resnets_0_conv1"),
        (
            "input_blocks_8_1_transformer_blocks_9_attn2_to_k",
            "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k",
        ),
        ("middle_block_1_proj_in", "mid_block_attentions_0_proj_in"),
        ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
        ("output_blocks_5_1_proj_out", "up_blocks_1_attentions_2_proj_out"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
        ("output_blocks_0_0_skip_connection", "up_blocks_0_resnets_0_conv_shortcut"),
        ("time_embed_2", "time_embedding_linear_2"),
        ("label_emb_0_0", "add_embedding_linear_1"),
    ],
)
def test_native_names_become_diffusers_names(native, diffusers):
    expert = read((f"lora_unet_{native}.lora_down.weight", f"lora_unet_{native}.lora_up.weight"))
    assert list(expert.layers) == [f"lora_unet_{diffusers}"]


def test_text_encoder_is_numbered_when_there_are_two():
    expert = read(
        (f"text_encoder.{TEXT_PATH}.lora_A.weight", f"text_encoder.{TEXT_PATH}.lora_B.weight"),
        (f"text_encoder_2.{TEXT_PATH}.lora_A.weight", f"text_encoder_2.{TEXT_PATH}.lora_B.weight"),
    )
    assert [name.split("_text")[0] for name in expert.layers] == ["lora_te1", "lora_te2"]


def test_alpha_is_the_rank_when_nothing_says_otherwise():
    assert read((f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight")).layers[NAME].alpha == 4.0


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"unet.lora_alpha": 8}, 8.0),
        ({"lora_alpha": 2}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 3}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_q": 3}}, 8.0),
        # rsLoRA: alpha / sqrt(4) = 8 / 2 must equal file alpha / 4, so the file alpha is 16.
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 16.0),
    ],
)
def test_alpha_comes_from_the_adapter_metadata_of_diffusers(settings, alpha):
    keys = (f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight")
    expert = read(keys, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert expert.layers[NAME].alpha == alpha


def test_peft_itself_writes_keys_that_are_read_with_the_same_delta(dense):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("down_blocks", torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)))
    base = model.down_blocks[0].weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["down_blocks.0"])
    adapted = peft.get_peft_model(model, config)
    torch.nn.init.normal_(adapted.base_model.model.down_blocks[0].lora_B["default"].weight)
    tensors = {name: value.detach().clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": config.lora_alpha, "use_rslora": True})}

    expert = Expert.from_state_dict(tensors, metadata, "peft")

    merged = adapted.merge_and_unload().down_blocks[0].weight.detach()
    (layer,) = expert.layers.values()
    assert torch.allclose(layer.delta(), merged - base, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.diffusion_model.out.0.weight"], r"1 of 1 keys are no LoRA keys, first 'model.*whole model"),
        ([f"{NAME}.hada_w1_a"], "LoHa and LoKr"),
        ([f"{NAME}.dora_scale"], "DoRA"),
        (["something.else"], "kohya, diffusers or peft"),
        ([], "holds no tensors"),
        ([f"{NAME}.lora_down.weight"], f"layer {NAME} has no up part"),
        ([f"{NAME}.lora_down.weight", f"unet.{PATH}.lora_A.weight"], "occurs twice"),
    ],
)
def test_keys_that_cannot_be_read_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        Expert.from_state_dict({key: torch.zeros(4, 6) for key in keys}, {}, "bad.safetensors")


def test_parts_of_different_rank_are_refused():
    tensors = {f"{NAME}.lora_down.weight": torch.zeros(4, 6), f"{NAME}.lora_up.weight": torch.zeros(5, 3)}
    with pytest.raises(InputError, match=r"bad: layer .* has rank 4 in its down part but 3"):
        Expert.from_state_dict(tensors, {}, "bad")


@pytest.mark.parametrize(
    ("key", "matched"),
    [
        (f"{NAME}.lora_down.weight", True),
        (f"{NAME}.alpha", True),
        (f"unet.{PATH.replace('.to_q', '.processor.to_q')}_lora.up.weight", True),
        (f"diffusion_model.input_blocks.1.1.{INNER}.lora_A.weight", True),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", True),
        (f"text_encoder.{TEXT_PATH}.lora_B.weight", True),
        (f"{JOINT}.lora_up.weight", True),
        (f"{SINGLE}.alpha", True),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", True),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", True),
        ("lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight", True),  # Qwen-Image
        ("lora_unet_single_transformer_blocks_0_attn_to_q.lora_up.weight", False),
        (f"unet.{PATH}.lora_A.weight", False),
        (f"unet.{PATH}.lora.down.weight", False),
        (f"{PATH}.lora_A.weight", False),
        (f"base_model.model.{PATH}.lora_A.weight", False),
    ],
)
def test_which_spellings_stock_comfyui_knows(key, matched):
    assert comfyui_matches(key) is matched
