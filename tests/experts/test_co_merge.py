import pytest
import torch
from safetensors.torch import save_file
from safety_experts.errors import InputError
from safety_experts.experts import co_merge
from safety_experts.experts.co_merge import ActivationCounter, load_activation_counts, save_activation_counts
from safety_experts.experts.expert import Expert, LoraLayer

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def count_one_by_one(experts, name, tokens):
    """The definition, with dense ΔW in float64 and plain loops."""
    deltas = [expert.layers[name].delta().double().flatten(1) if name in expert.layers else None for expert in experts]
    counts = torch.zeros(len(experts), next(delta for delta in deltas if delta is not None).shape[0], dtype=torch.int64)
    for token in tokens.double():
        strengths = [None if delta is None else (delta @ token).abs() for delta in deltas]
        for row in range(counts.shape[1]):
            best, winner = 0.0, None
            for index, strength in enumerate(strengths):
                if strength is not None and strength[row] > best:
                    best, winner = strength[row], index
            if winner is not None:
                counts[winner, row] += 1
    return counts


def test_worked_numbers_of_the_count():
    """ΔW_1 = [[2], [0], [1]], ΔW_2 = [[1], [0], [1]] on tokens 1, -3, 0: row 0 goes to the first expert twice, row 1 is
    zero for both, row 2 is a tie and goes to the earlier expert; the zero token counts for nobody."""
    experts = [
        Expert({"lora_unet_x": LoraLayer(torch.ones(1, 1), torch.tensor(column), 1.0)})
        for column in ([[2.0], [0.0], [1.0]], [[1.0], [0.0], [1.0]])
    ]
    counter = ActivationCounter(experts)
    counter.observe("lora_unet_x", torch.tensor([[1.0], [-3.0], [0.0]]))
    assert counter.counts["lora_unet_x"].tolist() == [[2, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_counts_equal_the_definition(make_expert, monkeypatch, chunk):
    monkeypatch.setattr(co_merge, "_CHUNK_ELEMENTS", chunk)
    experts = [make_expert(1, rank=4, alpha=2), make_expert(2, rank=3), make_expert(3, rank=5, layers=(CONV,))]
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    counter = ActivationCounter(experts)
    counter.observe(LINEAR, x)
    counter.observe(LINEAR, x[:1])
    tokens = torch.cat([x.reshape(-1, 10), x[0]])
    assert torch.equal(counter.counts[LINEAR], count_one_by_one(experts, LINEAR, tokens))
    assert counter.counts[LINEAR].sum() == 12 * len(tokens)


def test_convolutions_count_every_output_position(make_expert):
    experts = [make_expert(1, rank=4), make_expert(2, rank=3)]
    conv = torch.nn.Conv2d(5, 6, 3, stride=2, padding=1)
    image = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.functional.unfold(image, 3, stride=2, padding=1).transpose(1, 2).reshape(-1, 45)
    counter = ActivationCounter(experts)
    with counter.hook_modules([("down_blocks.0.resnets.0.conv1", conv)]):
        conv(image)
    assert torch.equal(counter.counts[CONV], count_one_by_one(experts, CONV, patches))


def test_it_works_in_inference_mode_and_half_precision(make_expert):
    counter = ActivationCounter([make_expert(1), make_expert(2)])
    with torch.inference_mode():
        counter.observe(LINEAR, torch.ones(3, 10, dtype=torch.bfloat16))
    counter.observe(LINEAR, torch.ones(2, 10, dtype=torch.float16, requires_grad=True))
    assert counter.counts[LINEAR].sum() == 5 * 12
    assert not counter.counts[LINEAR].is_inference()


def test_layers_never_seen_are_zero(make_expert):
    statistics = ActivationCounter([make_expert(1), make_expert(2)]).counts
    assert statistics[CONV].tolist() == [[0] * 6, [0] * 6]


def test_hooks_are_removed_also_after_an_error(make_expert):
    module = torch.nn.Linear(10, 12)
    named = [("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", module), ("other", torch.nn.ReLU())]
    counter = ActivationCounter([make_expert(1), make_expert(2)])
    with pytest.raises(RuntimeError, match="stop"), counter.hook_modules(named):
        module(torch.ones(2, 10))
        raise RuntimeError("stop")
    module(torch.ones(2, 10))
    assert counter.counts[LINEAR].sum() == 2 * 12
    assert not module._forward_pre_hooks


def test_a_model_without_the_layers_is_refused(make_expert):
    counter = ActivationCounter([make_expert(1)])
    with pytest.raises(InputError, match="no layer of expert_1 is in this model"), counter.hook_modules([]):
        pass


def test_a_model_of_other_width_is_refused(make_expert):
    with pytest.raises(InputError, match="gets 8 channels in this model but takes 10 in the experts"):
        ActivationCounter([make_expert(1)]).observe(LINEAR, torch.ones(2, 8))


def test_statistics_file_comes_back_for_experts_in_another_order(make_expert, tmp_path):
    experts = [make_expert(1), make_expert(2)]
    counts = {LINEAR: torch.arange(24).reshape(2, 12)}
    save_activation_counts(tmp_path / "s.safetensors", counts, experts, {"dataset": "toy"})
    assert torch.equal(load_activation_counts(tmp_path / "s.safetensors", experts)[LINEAR], counts[LINEAR])
    swapped = load_activation_counts(tmp_path / "s.safetensors", experts[::-1])
    assert torch.equal(swapped[LINEAR], counts[LINEAR][[1, 0]])


def test_statistics_of_other_experts_are_refused(make_expert, tmp_path):
    save_activation_counts(tmp_path / "s.safetensors", {LINEAR: torch.zeros(1, 12).long()}, [make_expert(1)], {})
    with pytest.raises(InputError, match=r"was calibrated for other experts \(expert_1\)"):
        load_activation_counts(tmp_path / "s.safetensors", [make_expert(2)])
    save_file({"x": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(InputError, match=r"no\.safetensors holds no activation statistics"):
        load_activation_counts(tmp_path / "no.safetensors", [make_expert(1)])
