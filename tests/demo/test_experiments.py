"""What an experiment on the toy world does again, and what it takes from its folder."""

import os

import pytest
import torch
from safety_experts.demo.experiments import Experiment, remembered, sampler, toy_recipe, trained

pytestmark = pytest.mark.slow

SHORT = ["steps=1", "batch_size=1", "anchor_weight=0"]


def test_a_reading_is_taken_once_for_each_thing_it_is_about(tmp_path):
    path = tmp_path / "reading.json"
    values = iter([1, 2, 3])
    assert remembered(path, {"steps": 10}, lambda: next(values)) == 1
    assert remembered(path, {"steps": 10}, lambda: next(values)) == 1
    assert remembered(path, {"steps": 20}, lambda: next(values)) == 2
    assert remembered(path, {"steps": 20}, lambda: next(values)) == 2


def test_an_expert_is_trained_again_only_when_it_would_be_another(tmp_path):
    sampler().build_dataset(tmp_path / "pairs", 1)
    other = sampler().build_dataset(tmp_path / "other", 2)
    path = tmp_path / "expert.safetensors"

    def is_trained_by(*arguments, **options) -> bool:
        before = path.stat().st_mtime_ns if path.exists() else None
        trained(tmp_path, "expert", *arguments, **options)
        return path.stat().st_mtime_ns != before

    assert is_trained_by(toy_recipe(0, SHORT), "hate")
    assert not is_trained_by(toy_recipe(0, SHORT), "hate")
    assert is_trained_by(toy_recipe(1, SHORT), "hate")
    assert is_trained_by(toy_recipe(1, SHORT), "hate", dataset=other)
    expert = trained(tmp_path, "stacked", toy_recipe(0, SHORT), "violence")
    assert is_trained_by(toy_recipe(1, SHORT), "hate", dataset=other, with_experts=[expert])
    assert not is_trained_by(toy_recipe(1, SHORT), "hate", dataset=other, with_experts=[expert])


def test_jobs_come_back_with_their_results_from_processes_of_one_thread(tmp_path):
    before = dict(os.environ)
    toy = Experiment(tmp_path, range(2), workers=2)
    assert toy.run(_what_it_sees, [1, 2, 3]) == {job: (tmp_path.name, job, 1) for job in (1, 2, 3)}
    assert dict(os.environ) == before  # other processes started from here compute as this one does


def _what_it_sees(work, job):
    return work.name, job, torch.get_num_threads()
