"""The bank of reference predictions: the same training, with fewer runs of the reference model."""

import pytest
import torch
from safety_experts.training.batches import BatchPlan
from safety_experts.training.reference_bank import ReferenceBank
from safety_experts.training.tensor_store import TensorStore


def train(run, steps=6):
    for _ in range(steps):
        run.take_step(lambda: False)
    return {name: value.detach().clone() for name, value in run.parameters.items()}


class CountingDenoiser:
    """Counts the predictions a denoiser makes without gradients."""

    def __init__(self, denoiser):
        self.denoiser, self.num_reference = denoiser, 0

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def predict(self, *inputs):
        self.num_reference += not torch.is_grad_enabled()
        return self.denoiser.predict(*inputs)


@pytest.mark.parametrize("options", [{}, {"anchor_weight": 10.0}, {"objective": "kto"}, {"winner_preserving": 1.0}])
def test_a_bank_changes_nothing_but_the_number_of_reference_runs(make_run, options):
    without = train(make_run(reference_epochs=1, **options))
    run = make_run(reference_epochs=1, **options)
    run.bank = ReferenceBank()
    run.policy.denoiser = CountingDenoiser(run.policy.denoiser)
    with_bank = train(run)
    assert all(torch.equal(value, without[name]) for name, value in with_bank.items())
    assert run.policy.denoiser.num_reference == 3  # 6 pairs in batches of 2: one epoch of the two that were trained


def test_draws_repeat_after_the_epochs_in_a_new_order(make_run):
    plan = make_run(reference_epochs=2).plan
    first, *later = ([plan.batch(number) for number in range(6 * cycle, 6 * cycle + 6)] for cycle in range(4))
    noises = [batch.noise for batch in first]
    assert len({float(noise.sum()) for noise in noises}) == 6
    orders = []
    for cycle in later:
        orders.append([next(i for i, n in enumerate(noises) if torch.equal(n, batch.noise)) for batch in cycle])
        for position, batch in zip(orders[-1], cycle, strict=True):
            assert batch.prompts == first[position].prompts
            assert torch.equal(batch.timesteps, first[position].timesteps)
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_without_reference_epochs_no_draw_repeats(make_run, pairs):
    plan = make_run().plan
    assert isinstance(plan, BatchPlan)
    assert len({float(plan.batch(number).noise.sum()) for number in range(30)}) == 30


def test_predictions_stay_on_disk_for_the_same_model_only(tmp_path):
    inputs = (torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([3, 4]), ["a", "b"])
    expected = torch.randn(2, 4, 4, 4)
    bank = ReferenceBank("model", TensorStore(tmp_path, "reference"))
    assert torch.equal(bank.predict(*inputs, lambda: expected), expected)
    bank.flush()

    def fail():
        raise AssertionError("computed again")

    again = ReferenceBank("model", TensorStore(tmp_path, "reference"))
    assert torch.equal(again.predict(*inputs, fail), expected)
    for other in (
        ReferenceBank("another", TensorStore(tmp_path, "reference")).predict(*inputs, lambda: -expected),
        again.predict(*inputs[:3], ["a", "c"], lambda: -expected),
        again.predict(inputs[0], inputs[1], inputs[2] + 1, inputs[3], lambda: -expected),
        again.predict(inputs[0] + 1, *inputs[1:], lambda: -expected),
    ):
        assert torch.equal(other, -expected)


def test_bfloat16_predictions_are_kept_in_half_the_bytes(tmp_path):
    exact, halved = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4).bfloat16().float()
    store = TensorStore(tmp_path, "reference")
    bank = ReferenceBank("", store)
    for index, prediction in enumerate((exact, halved)):
        bank.predict(exact, exact, torch.tensor([index]), [""], lambda value=prediction: value)
    bank.flush()
    dtypes = {store[key].dtype for key in store._readers}
    assert dtypes == {torch.float32, torch.bfloat16}
