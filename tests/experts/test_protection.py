"""Overlap and protection against worked numbers and a dense float64 oracle that knows nothing of factors."""

from dataclasses import replace

import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.overlap import overlap, overlap_table, total
from safety_experts.experts.protection import SPACES, kept_energy, protect

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
METRICS = ("read_share", "written_share", "along_expert", "read_chance", "written_chance")


def lora(name: str, down: list, up: list, alpha: float = 1.0) -> Expert:
    return Expert({LINEAR: LoraLayer(torch.tensor(down), torch.tensor(up), alpha)}, name=name)


@pytest.fixture
def expert():
    """ΔW = [[2, 0, 0], [0, 0, 0]]: reads the first input, writes the first output."""
    return lora("violence", [[1.0, 0.0, 0.0]], [[2.0], [0.0]])


@pytest.fixture
def style():
    """ΔW = [[-1, 2, 0], [0, 0, 2]], of squared size 9, by an alpha of half the rank."""
    return lora("watercolour", [[-1.0, 2.0, 0.0], [0.0, 0.0, 2.0]], [[2.0, 0.0], [0.0, 2.0]], alpha=1.0)


def test_overlap_in_worked_numbers(expert, style):
    found = overlap(expert, style)[LINEAR]

    assert found.read_share == pytest.approx(1 / 9)  # of 9, the -1 that reads the first input
    assert found.written_share == pytest.approx(5 / 9)  # the row (-1, 2, 0)
    assert found.along_expert == pytest.approx(-1 * 2 / 2**2)
    assert (found.read_chance, found.written_chance) == pytest.approx((1 / 3, 1 / 2))


@pytest.mark.parametrize(
    ("space", "strength", "expected"),
    [
        ("input", 1.0, [[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]),
        ("input", 0.5, [[-0.5, 2.0, 0.0], [0.0, 0.0, 2.0]]),
        ("output", 1.0, [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]),
        ("both", 1.0, [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]),
        ("both", 0.5, [[-0.25, 1.0, 0.0], [0.0, 0.0, 2.0]]),
    ],
)
def test_protection_in_worked_numbers(expert, style, space, strength, expected):
    protected = protect(style, [expert], space=space, strength=strength)

    torch.testing.assert_close(protected.layers[LINEAR].delta(), torch.tensor(expected))
    assert kept_energy(style, protected) == pytest.approx(float(torch.tensor(expected).square().sum()) / 9)


@pytest.mark.parametrize("style_dtype", [torch.float32, torch.float16])
def test_overlap_agrees_with_a_dense_oracle(make_expert, dense, style_dtype):
    expert, style = make_expert(1, rank=3, alpha=2.0), make_expert(2, rank=5, alpha=1.5, dtype=style_dtype)

    for name, found in overlap(expert, style).items():
        dense_expert, dense_style = (dense(lora, name).flatten(1) for lora in (expert, style))
        u, s, vh = torch.linalg.svd(dense_expert)
        rank = int((s > 1e-9 * s[0]).sum())
        size = dense_style.norm() ** 2
        expected = (
            (dense_style @ vh[:rank].T).norm() ** 2 / size,
            (u[:, :rank].T @ dense_style).norm() ** 2 / size,
            (dense_style * dense_expert).sum() / dense_expert.norm() ** 2,
            rank / dense_expert.shape[1],
            rank / dense_expert.shape[0],
        )
        assert [getattr(found, metric) for metric in METRICS] == pytest.approx([float(value) for value in expected])


@pytest.mark.parametrize("space", SPACES)
def test_protection_agrees_with_a_dense_oracle_for_several_experts_of_mixed_ranks(make_expert, dense, space):
    """On linear and convolution layers, of which the experts have different ones."""
    experts = [make_expert(1, rank=2, alpha=1.0), make_expert(3, rank=3, layers=(CROSS, CONV))]
    style = make_expert(2, rank=4, alpha=8.0, dtype=torch.float16)
    protected = protect(style, experts, space=space, strength=0.7)

    for name in style.layers:
        stacked = [dense(expert, name).flatten(1) for expert in experts if name in expert.layers]
        expected = dense(style, name).flatten(1)
        if space != "output":
            reads = torch.cat(stacked)
            expected = expected - 0.7 * expected @ torch.linalg.pinv(reads) @ reads
        if space != "input":
            writes = torch.cat(stacked, dim=1)
            expected = expected - 0.7 * writes @ torch.linalg.pinv(writes) @ expected
        torch.testing.assert_close(dense(protected, name).flatten(1), expected, rtol=1e-4, atol=1e-4)
        assert protected.layers[name].rank == 4 and protected.layers[name].alpha == 8.0


@pytest.mark.parametrize("space", SPACES)
def test_a_protected_style_has_no_overlap_and_protecting_again_changes_nothing(make_expert, space):
    experts, style = [make_expert(1, rank=3), make_expert(3, rank=2)], make_expert(2)
    protected = protect(style, experts, space=space)
    again = protect(protected, experts, space=space)

    for expert in experts:
        for found in overlap(expert, protected).values():
            assert found.along_expert == pytest.approx(0, abs=1e-5)
            assert found.read_share == pytest.approx(0, abs=1e-10) or space == "output"
            assert found.written_share == pytest.approx(0, abs=1e-10) or space == "input"
    for name, layer in protected.layers.items():
        torch.testing.assert_close(again.layers[name].delta(), layer.delta(), rtol=1e-4, atol=1e-4)
    assert 0.05 < kept_energy(style, protected) < 0.95


def test_no_input_makes_the_style_write_where_the_expert_writes(make_expert, dense):
    expert, style = make_expert(1), make_expert(2)
    protected = protect(style, [expert], space="output")
    inputs = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).double()

    written = inputs @ (dense(expert, LINEAR) + dense(protected, LINEAR)).T @ expert.layers[LINEAR].up.double()
    alone = inputs @ dense(expert, LINEAR).T @ expert.layers[LINEAR].up.double()
    torch.testing.assert_close(written, alone, rtol=1e-4, atol=1e-4)


def test_what_the_expert_reads_makes_the_style_write_nothing(make_expert, dense):
    expert, style = make_expert(1), make_expert(2)
    protected = protect(style, [expert], space="input")
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()

    heard = inputs @ expert.layers[LINEAR].down.double()
    both = heard @ (dense(expert, LINEAR) + dense(protected, LINEAR)).T
    torch.testing.assert_close(both, heard @ dense(expert, LINEAR).T, rtol=1e-4, atol=1e-4)


def test_strength_0_and_layers_apart_from_the_expert_stay_the_same_tensors(make_expert):
    style, expert = make_expert(2), make_expert(1, layers=(LINEAR,))

    for protected, kept in (
        (protect(style, [expert], strength=0.0), style.layers),
        (protect(style, [expert]), (CONV,)),
    ):
        assert all(protected.layers[name] is style.layers[name] for name in kept)


def test_a_style_orthogonal_to_the_expert_and_an_expert_of_zeros_change_nothing(expert):
    apart = lora("apart", [[0.0, 3.0, 4.0]], [[0.0], [1.0]])
    nothing = lora("untrained", [[1.0, 1.0, 1.0]], [[0.0], [0.0]])

    assert overlap(nothing, apart)[LINEAR].along_expert == overlap(nothing, apart)[LINEAR].read_share == 0
    for other in (expert, nothing):
        protected = protect(apart, [other], space="both")
        assert torch.equal(protected.layers[LINEAR].delta(), apart.layers[LINEAR].delta())
        assert kept_energy(apart, protected) == pytest.approx(1)


def test_a_copy_of_the_expert_is_removed_altogether(make_expert):
    expert = make_expert(1)

    assert total(overlap(expert, expert).values()).along_expert == pytest.approx(1)
    for space in SPACES:
        assert kept_energy(expert, protect(expert, [expert], space=space)) == pytest.approx(0, abs=1e-10)


def test_the_result_names_its_parents_and_the_report_the_layers(make_expert):
    style, expert = make_expert(2, categories=()), make_expert(1)
    style = replace(style, file_sha256="ab" * 32)
    protected = protect(style, [expert], space="both", strength=0.5)

    assert protected.name == "expert_2_protected" and protected.file_sha256 is None
    assert (protected.info.origin.space, protected.info.origin.strength) == ("both", 0.5)
    assert [(parent.name, parent.sha256) for parent in protected.info.parents] == [
        ("expert_2", "ab" * 32),
        ("expert_1", None),
    ]
    table = overlap_table(expert, style, overlap(expert, style), [CROSS])
    assert [line.split()[-1] for line in table.splitlines()[2:]] == [CROSS, "together"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": []}, "give at least one expert"),
        ({"space": "rows"}, "space 'rows' must be one of output, input, both"),
        ({"strength": 1.5}, "strength 1.5 must be from 0 to 1"),
        ({"strength": float("nan")}, "strength nan must be from 0 to 1"),
        ({"experts": [lora("wide", [[1.0] * 4], [[1.0], [1.0]])]}, r"is \[2, 3\] in watercolour but \[2, 4\] in wide"),
        ({"experts": [Expert({"lora_unet_other": LoraLayer(torch.ones(1, 3), torch.ones(2, 1), 1.0)})]}, "no layer in"),
    ],
)
def test_what_cannot_be_protected_is_an_input_error(expert, style, options, message):
    with pytest.raises(InputError, match=message):
        protect(style, **{"experts": [expert], **options})
