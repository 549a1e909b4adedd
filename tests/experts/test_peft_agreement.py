"""Our merges beside peft's add_weighted_adapter on the same adapters: equal where it is right, different where not."""

import numpy as np
import pytest
import torch
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts

NAME = "lora_unet_x"
WEIGHTS = [0.7, 1.3, 0.4]


@pytest.fixture(scope="module")
def adapters():
    """(peft model, our experts): three adapters of rank 4, alpha 6 on one linear layer [12, 10]."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(10, 12, bias=False)), config, adapter_name="0")
    experts = []
    for number in range(3):
        if number:
            model.add_adapter(str(number), config)
        layer = model.base_model.model[0]
        torch.nn.init.normal_(layer.lora_B[str(number)].weight)
        down, up = layer.lora_A[str(number)].weight.detach(), layer.lora_B[str(number)].weight.detach()
        experts.append(Expert({NAME: LoraLayer(down, up, 6.0)}, ExpertInfo(), str(number)))
    return model, experts


def combine(model, combination_type, **options):
    """Return ΔW of peft's combination."""
    name = "_".join([combination_type, *(str(value).replace(".", "-") for value in options.values())])
    model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, name, combination_type=combination_type, **options)
    return model.base_model.model[0].get_delta_weight(name).detach()


def ours(experts, method, **parameters):
    return merge_experts(experts, method, weights=WEIGHTS, parameters=parameters).layers[NAME].delta()


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_cat_equals_our_weighted_sum(adapters):
    model, experts = adapters
    assert relative(ours(experts, "linear"), combine(model, "cat")) < 1e-5


@pytest.mark.parametrize("rank", [2, 5])
def test_svd_equals_our_truncated_sum(adapters, rank):
    model, experts = adapters
    assert relative(ours(experts, "svd", rank=rank), combine(model, "svd", svd_rank=rank)) < 1e-5


def test_magnitude_prune_svd_equals_ours(adapters):
    model, experts = adapters
    expected = combine(model, "magnitude_prune_svd", svd_rank=5, density=0.5)
    assert relative(ours(experts, "magnitude-prune", density=0.5, rank=5), expected) < 1e-5


def test_ties_differs_by_the_vote_only(adapters):
    """peft lets experts vote before their weights count; with equal weights both are the same (test_merge_methods)."""
    model, experts = adapters
    expected = combine(model, "ties_svd", svd_rank=10, density=0.5)
    folded = [
        Expert({NAME: LoraLayer(e.layers[NAME].down, e.layers[NAME].up * w, 6.0)})
        for e, w in zip(experts, WEIGHTS, strict=True)
    ]
    found = ours(experts, "ties", density=0.5, rank=10)
    assert relative(found, expected) > 1e-2
    alone = merge_experts(folded, "ties", parameters={"density": 0.5, "rank": 10}).layers[NAME].delta()
    assert relative(found, alone) < 1e-5  # a weight is the same as an expert trained that strong


@pytest.mark.parametrize("combination_type", ["linear", "ties"])
def test_combinations_on_the_factors_are_not_the_sum_of_deltas(adapters, combination_type):
    """B and A mixed on their own bring cross terms B_k A_l: peft's linear is not what its name says."""
    model, experts = adapters
    options = {} if combination_type == "linear" else {"density": 0.5}
    method = {"linear": "linear", "ties": "ties"}[combination_type]
    parameters = {} if method == "linear" else {"density": 0.5, "rank": 10}
    assert relative(combine(model, combination_type, **options), ours(experts, method, **parameters)) > 0.1
