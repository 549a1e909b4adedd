"""Each method against an oracle in numpy on dense float64 ΔW, written from the paper's formula."""

import itertools

import numpy as np
import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.merge_methods.selection import only_in_one
from safety_experts.experts.merge_methods.sparsification import della_probabilities
from safety_experts.experts.merging import METHODS, merge_experts
from safety_experts.experts.truncation import randomized_svd

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
FULL_RANK = {"rank": 100}  # above every dimension: nothing is truncated


@pytest.fixture
def experts(make_expert):
    """Mixed ranks and alphas; the last one lacks the convolution."""
    return [
        make_expert(1, rank=4, alpha=2, categories=["violence"]),
        make_expert(2, rank=3, alpha=5, categories=["hate"]),
        make_expert(3, rank=6, categories=["shocking"], layers=(LINEAR, CROSS)),
    ]


def dense_matrices(experts, name, weights=None):
    """weight · ΔW_k as float64 matrices, of the experts that have the layer."""
    matrices = []
    for expert, weight in zip(experts, weights or [1.0] * len(experts), strict=True):
        if name in expert.layers:
            layer = expert.layers[name]
            up, down = (x.double().numpy().reshape(len(x), -1) for x in (layer.up, layer.down))
            matrices.append(weight * layer.alpha / len(down) * up @ down)
    return matrices


def merged_matrix(merged, name):
    delta = merged.layers[name].delta().double().numpy()
    return delta.reshape(len(delta), -1)


def assert_close(found, expected, relative=1e-5):
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def trim(matrix, density):
    """Keep the int(density · size) largest magnitudes, by sorting."""
    kept = np.zeros(matrix.size)
    order = sorted(range(matrix.size), key=lambda i: -abs(matrix.flat[i]))[: int(density * matrix.size)]
    kept[order] = matrix.flat[order]
    return kept.reshape(matrix.shape)


def elect(matrices):
    """TIES' sign election and disjoint mean, element by element."""
    out = np.zeros(matrices[0].shape)
    for index in np.ndindex(out.shape):
        values = [matrix[index] for matrix in matrices]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        out[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


@pytest.mark.parametrize("name", [LINEAR, CROSS, CONV])
def test_average_and_task_arithmetic(experts, name):
    weights = [1.0, 2.0, -0.5]
    total = sum(dense_matrices(experts, name, weights))
    assert_close(merged_matrix(merge_experts(experts, "average", weights=weights), name), total / 3)
    merged = merge_experts(experts, "task-arithmetic", weights=weights, parameters={"scale": 0.3})
    assert_close(merged_matrix(merged, name), 0.3 * total)


@pytest.mark.parametrize("name", [LINEAR, CROSS, CONV])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_best_approximation_and_says_what_it_kept(experts, name, rank):
    merged = merge_experts(experts, "svd", parameters={"rank": rank})
    u, s, vh = np.linalg.svd(sum(dense_matrices(experts, name)), full_matrices=False)
    assert_close(merged_matrix(merged, name), (u[:, :rank] * s[:rank]) @ vh[:rank])
    assert merged.layers[name].rank == rank
    assert merged.info.retained_energy[name] == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_svd_by_energy_takes_the_fewest_ranks_that_hold_it(experts):
    """Singular values 3, 2, 1, 0.5 hold 9, 13, 14, 14.25 of 14.25: 0.9 needs two of them, 0.95 three."""
    q, _ = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    p, _ = torch.linalg.qr(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    expert = Expert({"lora_unet_x": LoraLayer((p * torch.tensor([3.0, 2.0, 1.0, 0.5])).T, q, 4.0)})
    for energy, rank in ((0.6, 1), (0.9, 2), (0.95, 3), (1.0, 4)):
        merged = merge_experts([expert], "svd", parameters={"energy": energy})
        assert merged.layers["lora_unet_x"].rank == rank
    assert merge_experts([expert], "svd", parameters={"energy": 0.95, "rank": 1}).layers["lora_unet_x"].rank == 1


def test_svd_without_a_limit_loses_nothing_and_drops_empty_ranks(experts):
    merged = merge_experts([experts[0], experts[0]], "svd")
    assert merged.layers[LINEAR].rank == 4  # twice the same expert has no more rank than one
    assert_close(merged_matrix(merged, LINEAR), 2 * dense_matrices(experts[:1], LINEAR)[0])
    assert merged.info.retained_energy[LINEAR] == 1.0


@pytest.mark.parametrize("name", [LINEAR, CROSS, CONV])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties(experts, name, density):
    weights = [1.0, 0.5, -2.0]
    merged = merge_experts(experts, "ties", weights=weights, parameters={"density": density, "scale": 1.5, **FULL_RANK})
    expected = 1.5 * elect([trim(matrix, density) for matrix in dense_matrices(experts, name, weights)])
    assert_close(merged_matrix(merged, name), expected)


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_magnitude_prune(experts, name):
    merged = merge_experts(experts, "magnitude-prune", parameters={"density": 0.3, **FULL_RANK})
    assert_close(merged_matrix(merged, name), sum(trim(matrix, 0.3) for matrix in dense_matrices(experts, name)))


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_breadcrumbs_drop_both_ends(experts, name):
    merged = merge_experts(experts, "breadcrumbs", parameters={"density": 0.4, "gamma": 0.1, **FULL_RANK})
    expected = sum(trim(matrix, 0.1 + 0.4) - trim(matrix, 0.1) for matrix in dense_matrices(experts, name))
    assert_close(merged_matrix(merged, name), expected)


@pytest.mark.parametrize("method", ["ties", "magnitude-prune"])
def test_agreement_with_peft_on_dense_deltas(experts, method):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    function = {"ties": merge_utils.ties, "magnitude-prune": merge_utils.magnitude_prune}[method]
    tensors = [torch.from_numpy(matrix).float() for matrix in dense_matrices(experts, LINEAR)]
    expected = function(tensors, torch.ones(3), density=0.25).double().numpy()
    merged = merge_experts(experts, method, parameters={"density": 0.25, **FULL_RANK})
    assert_close(merged_matrix(merged, LINEAR), expected)


def test_dare_keeps_the_wanted_fraction_rescaled(make_expert):
    expert = make_expert(1, rank=6)
    found = merged_matrix(merge_experts([expert], "dare", parameters={"density": 0.25, **FULL_RANK}), CONV)
    delta = dense_matrices([expert], CONV)[0]
    kept = np.abs(found) > 2 * np.abs(delta)
    assert np.allclose(found, np.where(kept, 4 * delta, 0.0), atol=1e-5)
    assert abs(kept.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / delta.size)


def test_dare_ties_votes_on_what_dare_left(experts):
    """The masks are read off the single experts: an expert's random numbers follow it into any merge."""
    parameters = {"density": 0.6, "seed": 3, **FULL_RANK}
    alone = [merged_matrix(merge_experts([expert], "dare", parameters=parameters), LINEAR) for expert in experts]
    alone = [np.where(np.abs(matrix) > 1e-5, matrix, 0.0) for matrix in alone]
    assert_close(merged_matrix(merge_experts(experts, "dare", parameters=parameters), LINEAR), sum(alone), 1e-5)
    assert_close(merged_matrix(merge_experts(experts, "dare-ties", parameters=parameters), LINEAR), elect(alone), 1e-5)


def test_random_dropping_follows_the_seed(experts):
    def merge(seed):
        return merged_matrix(merge_experts(experts, "dare", parameters={"seed": seed, **FULL_RANK}), LINEAR)

    assert np.array_equal(merge(0), merge(0))
    assert not np.allclose(merge(0), merge(1))


def test_della_keeps_large_elements_more_often():
    """A row 1, -3, 2, 0 has ranks 1, 3, 2, 0; density 0.5 and epsilon 0.3 give 0.35 + 0.1 · rank."""
    probabilities = della_probabilities(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 0.5, 0.3)
    assert torch.allclose(probabilities, torch.tensor([[0.45, 0.65, 0.55, 0.35]]))


def test_della_divides_by_the_probability_and_votes(experts):
    parameters = {"density": 0.5, "epsilon": 0.4, **FULL_RANK}
    alone = []
    for expert in experts:
        found = merged_matrix(merge_experts([expert], "della", parameters=parameters), LINEAR)
        delta = dense_matrices([expert], LINEAR)[0]
        order = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
        expected = delta / (0.3 + 0.4 * order / 9)
        kept = np.abs(found) > 1e-4
        assert np.allclose(found[kept], expected[kept], rtol=1e-4, atol=1e-4)
        assert 0.2 < kept.mean() < 0.8
        alone.append(np.where(kept, found, 0.0))
    assert_close(merged_matrix(merge_experts(experts, "della", parameters=parameters), LINEAR), elect(alone), 1e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_slerp(experts, name, t):
    first, second = dense_matrices(experts[:2], name)
    cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    expected = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    assert_close(merged_matrix(merge_experts(experts[:2], "slerp", parameters={"t": t}), name), expected)


def test_slerp_of_parallel_experts_is_a_straight_line(experts):
    merged = merge_experts([experts[0], experts[0]], "slerp", weights=[1.0, 3.0], parameters={"t": 0.25})
    assert_close(merged_matrix(merged, LINEAR), 1.5 * dense_matrices(experts[:1], LINEAR)[0])


def test_karcher_mean_is_stationary_and_has_the_mean_norm(experts):
    """At the mean m of unit vectors u_k the tangents towards them, log_m(u_k), add up to zero."""
    matrices = dense_matrices(experts, LINEAR)
    norms = [np.linalg.norm(matrix) for matrix in matrices]
    found = merged_matrix(merge_experts(experts, "karcher"), LINEAR)
    assert np.linalg.norm(found) == pytest.approx(np.mean(norms), rel=1e-5)
    mean = found / np.linalg.norm(found)
    tangents = []
    for matrix, norm in zip(matrices, norms, strict=True):
        cosine = (matrix / norm * mean).sum()
        tangents.append(np.arccos(cosine) * (matrix / norm - cosine * mean) / np.sqrt(1 - cosine**2))
    assert np.linalg.norm(sum(tangents)) < 1e-5


def test_karcher_of_two_is_the_middle_of_slerp(experts):
    equal = [1.0 / np.linalg.norm(matrix) for matrix in dense_matrices(experts[:2], LINEAR)]
    slerp = merge_experts(experts[:2], "slerp", weights=equal)
    karcher = merge_experts(experts[:2], "karcher", weights=equal)
    assert_close(merged_matrix(karcher, LINEAR), merged_matrix(slerp, LINEAR), 1e-5)


@pytest.mark.parametrize("name", [LINEAR, CROSS])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_knots(experts, name, density):
    matrices = dense_matrices(experts, name)
    u, s, vh = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    real = s > 1e-10 * s[0]
    columns = matrices[0].shape[1]
    aligned = [vh[real][:, k * columns : (k + 1) * columns] for k in range(len(matrices))]
    expected = (u[:, real] * s[real]) @ elect([trim(v, density) for v in aligned])
    merged = merge_experts(experts, "knots", parameters={"density": density})
    assert_close(merged_matrix(merged, name), expected, 1e-5)


@pytest.mark.parametrize("name", [LINEAR, CROSS, CONV])
@pytest.mark.parametrize("keep_fraction", [0.5, 1.0])
def test_task_singular_vectors(experts, name, keep_fraction):
    lefts, values, rights = [], [], []
    for expert, matrix in zip(experts, dense_matrices(experts, name), strict=False):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        # As in the method, a fraction of the expert's rank (and no more than the matrix has).
        num = max(1, round(keep_fraction * min(expert.layers[name].rank, *matrix.shape)))
        lefts.append(u[:, :num])
        values.append(s[:num])
        rights.append(vh[:num])

    def polar(matrix):
        u, _, vh = np.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    left, right = polar(np.concatenate(lefts, axis=1)), polar(np.concatenate(rights).T)
    expected = left @ np.diag(np.concatenate(values)) @ right.T
    merged = merge_experts(experts, "tsv", parameters={"keep_fraction": keep_fraction})
    assert_close(merged_matrix(merged, name), expected, 1e-5)


def test_co_merge_by_layer_takes_the_whole_layer(experts):
    rows = {LINEAR: 12, CROSS: 12, CONV: 6}
    counts = {name: torch.ones(3, num, dtype=torch.int64) for name, num in rows.items()}
    counts[LINEAR][2] = 2
    counts[CROSS][1, 0] = 9
    counts[CONV][2] = 0
    merged = merge_experts(experts, "co-merge", activation_counts=counts, parameters={"granularity": "layer"})
    for name, winner in ((LINEAR, 2), (CROSS, 1), (CONV, 0)):  # the last is a tie
        assert_close(merged_matrix(merged, name), dense_matrices([experts[winner]], name)[0])
        assert merged.layers[name].rank == experts[winner].layers[name].rank


def test_co_merge_without_data_by_row_and_by_layer(experts):
    matrices = dense_matrices(experts, LINEAR)
    norms = np.array([np.linalg.norm(matrix, axis=1) for matrix in matrices])
    by_row = merged_matrix(merge_experts(experts, "co-merge-weights"), LINEAR)
    expected = np.stack([matrices[winner][row] for row, winner in enumerate(norms.argmax(axis=0))])
    assert len(set(norms.argmax(axis=0))) > 1
    assert_close(by_row, expected)
    by_layer = merge_experts(experts, "co-merge-weights", parameters={"granularity": "layer"})
    assert_close(merged_matrix(by_layer, LINEAR), matrices[norms.sum(axis=1).argmax()])


def test_co_merge_without_data_by_weight(experts):
    matrices = np.stack(dense_matrices(experts, LINEAR))
    expected = np.take_along_axis(matrices, np.abs(matrices).argmax(axis=0)[None], axis=0)[0]
    merged = merge_experts(experts, "co-merge-weights", parameters={"granularity": "weight"})
    assert_close(merged_matrix(merged, LINEAR), expected)


def test_co_merge_by_factor_element(make_expert, experts):
    same_rank = [make_expert(seed, rank=4, alpha=8) for seed in (1, 2)]
    merged = merge_experts(same_rank, "co-merge-weights", parameters={"granularity": "factor"}).layers[LINEAR]
    downs = np.stack([expert.layers[LINEAR].down.numpy() for expert in same_rank])
    ups = np.stack([2 * expert.layers[LINEAR].up.numpy() for expert in same_rank])
    for found, candidates in ((merged.down.numpy(), downs), (merged.up.numpy(), ups)):
        expected = np.take_along_axis(candidates, np.abs(candidates).argmax(axis=0)[None], axis=0)[0]
        assert np.array_equal(found, expected)
    with pytest.raises(InputError, match=r"has ranks \[3, 4, 6\]; granularity factor needs experts of one rank"):
        merge_experts(experts, "co-merge-weights", parameters={"granularity": "factor"})


def test_randomized_svd_finds_the_leading_part():
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(300, 60, generator=generator))
    p, _ = torch.linalg.qr(torch.randn(200, 60, generator=generator))
    values = 0.8 ** torch.arange(60.0)
    u, s, vh = randomized_svd((q * values) @ p.T, 24)
    assert torch.allclose(s[:16], values[:16], rtol=1e-4)
    assert torch.allclose((u[:, :8] * s[:8]) @ vh[:8], (q[:, :8] * values[:8]) @ p.T[:8], atol=1e-5)


def test_truncation_of_dense_methods_is_close_to_optimal_for_large_layers():
    """A dense result with a flat tail, the hard case for randomized SVD: within 1 % of the best error."""
    generator = torch.Generator().manual_seed(0)
    experts = [
        Expert({"lora_unet_x": LoraLayer(*(torch.randn(*shape, generator=generator) for shape in shapes), 4.0)})
        for shapes in [((4, 200), (220, 4))] * 3
    ]
    full = merge_experts(experts, "ties", parameters={"rank": 200}).layers["lora_unet_x"].delta()
    small = merge_experts(experts, "ties", parameters={"rank": 12})
    s = torch.linalg.svdvals(full)
    best = s[12:].norm()
    assert (small.layers["lora_unet_x"].delta() - full).norm() <= 1.01 * best
    assert small.info.retained_energy["lora_unet_x"] == pytest.approx(float(1 - (best / s.norm()) ** 2), abs=1e-3)


# Settings at which nothing is dropped, so that one expert must come back unchanged.
KEEP_ALL = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}


def all_methods(*, without=()):
    return [name for name in METHODS if name not in without]


def counts_for(experts):
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for name, num in ((LINEAR, 12), (CROSS, 12), (CONV, 6)):
        counts[name] = torch.randint(1, 1 << 30, (len(experts), num), generator=generator)
        counts[name][[index for index, expert in enumerate(experts) if name not in expert.layers]] = 0
    return counts


def merge(experts, method, weights=None, activation_counts=None):
    """Two experts for slerp, all otherwise."""
    experts = experts[:2] if method == "slerp" else experts
    weights = [1.0] * len(experts) if weights is None else weights[: len(experts)]
    return merge_experts(experts, method, weights=weights, activation_counts=activation_counts or counts_for(experts))


@pytest.mark.parametrize("method", all_methods())
def test_one_expert_is_the_identity(experts, method):
    known = {parameter.name for parameter in METHODS[method].parameters}
    parameters = {name: value for name, value in KEEP_ALL.items() if name in known}
    merged = merge_experts(experts[:1], method, parameters=parameters)
    for name in (LINEAR, CROSS, CONV):
        assert_close(merged_matrix(merged, name), dense_matrices(experts[:1], name)[0])
        if METHODS[method].is_exact:
            assert torch.equal(merged.layers[name].up, experts[0].layers[name].up)


@pytest.mark.parametrize("method", all_methods())
def test_weights_scale_the_result(experts, method):
    single = merge(experts, method, [1.0, 2.0, 0.5])
    triple = merge(experts, method, [3.0, 6.0, 1.5])
    for name in single.layers:
        assert_close(merged_matrix(triple, name), 3 * merged_matrix(single, name), 1e-4)


@pytest.mark.parametrize("method", all_methods())
def test_the_order_of_experts_does_not_matter(experts, method):
    weights, counts = [1.0, 2.0, 0.5], counts_for(experts)
    size = 2 if method == "slerp" else 3
    reference = merge(experts, method, weights, counts)
    for order in itertools.permutations(range(size)):
        permuted = {name: values[list(order)] for name, values in counts.items()}
        merged = merge([experts[index] for index in order], method, [weights[index] for index in order], permuted)
        for name in reference.layers:
            assert_close(merged_matrix(merged, name), merged_matrix(reference, name), 1e-4)


@pytest.mark.parametrize("method", all_methods(without=("dare", "dare-ties", "della")))  # their draws follow the file
def test_only_delta_matters_not_alpha_or_rank(experts, method):
    """Other alpha, scaled factors and two ranks of zeros: the same ΔW gives the same merge."""
    respelled = []
    for expert in experts:
        layers = {}
        for name, layer in expert.layers.items():
            down = torch.cat([layer.down * 8, torch.zeros_like(layer.down[:2])])
            up = torch.cat([layer.up / 2, torch.ones_like(layer.up[:, :2])], dim=1)
            layers[name] = LoraLayer(down, up, layer.alpha / layer.rank / 4 * (layer.rank + 2))
        respelled.append(Expert(layers))
    counts = counts_for(experts)
    before, after = merge(experts, method, activation_counts=counts), merge(respelled, method, activation_counts=counts)
    for name in before.layers:
        assert_close(merged_matrix(after, name), merged_matrix(before, name), 1e-4)


@pytest.mark.parametrize("method", all_methods())
def test_registry_entries_are_complete(method):
    entry = METHODS[method]
    assert entry.title and entry.summary.endswith(".") and entry.paper_url.startswith("https://")
    for parameter in entry.parameters:
        assert parameter.parse(parameter.default, method) == parameter.default
        assert parameter.tooltip.endswith(".")
    assert bool(entry.parameters) or method in ("linear", "average", "fitted")


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("svd", {"rank": "many"}, "svd: rank must be int, got 'many'"),
        ("ties", {"density": 1.5}, "ties: density must be from 0.001 to 1, got 1.5"),
        ("co-merge", {"granularity": "pixel"}, "co-merge: granularity must be one of row, layer, got 'pixel'"),
        ("della", {"density": 0.95, "epsilon": 0.2}, "della: density 0.95 ± epsilon 0.2 / 2 must stay"),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.3}, "density 0.8 and gamma 0.3 together are more than 1"),
        ("slerp", {}, "slerp merges two experts, got 3; use karcher for more"),
    ],
)
def test_wrong_parameters_are_one_line(experts, method, parameters, message):
    with pytest.raises(InputError, match=message):
        merge_experts(experts, method, parameters=parameters, activation_counts=counts_for(experts))


def test_patches_keep_the_rows_that_one_expert_alone_wants():
    strength = torch.tensor([[1.0, 0.7, 0.2, 0.1], [0.9, 0.1, 0.8, 0.05]])
    assert only_in_one(strength, 0.5).tolist() == [[False, True, False, False], [False, False, True, False]]
    assert not only_in_one(strength, 1.0).any()  # all rows are wanted by both
    assert not only_in_one(torch.zeros(2, 4), 0.5).any()


def test_a_patch_merge_is_its_rows_exactly(experts):
    merged = merge_experts(experts, "patch", parameters={"share": 0.4})
    for name in merged.layers:
        matrices = dense_matrices(experts, name)
        tops = [set(np.argsort(-np.linalg.norm(m, axis=1))[: round(0.4 * len(m))]) for m in matrices]
        expected = np.zeros(matrices[0].shape)
        for index, (matrix, top) in enumerate(zip(matrices, tops, strict=True)):
            alone = sorted(top - set().union(*(other for j, other in enumerate(tops) if j != index)))
            expected[alone] = matrix[alone]
        assert expected.any()
        assert_close(merged_matrix(merged, name), expected)
