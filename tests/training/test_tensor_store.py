import torch
from safety_experts.training.tensor_store import TensorStore


def test_shards_are_read_back_by_a_new_store(tmp_path):
    store = TensorStore(tmp_path, "latents")
    store.add_shard({"a": torch.arange(3.0)})
    store.add_shard({"b": torch.ones(2, 2).t()})
    again = TensorStore(tmp_path, "latents")
    assert "a" in again and "b" in again and "c" not in again
    assert torch.equal(again["a"], torch.arange(3.0))
    assert TensorStore(tmp_path, "text").__contains__("a") is False


def test_a_damaged_shard_is_dropped_and_the_others_stay(tmp_path, caplog):
    store = TensorStore(tmp_path, "latents")
    store.add_shard({"a": torch.zeros(4)})
    store.add_shard({"b": torch.ones(4)})
    damaged = tmp_path / "latents-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    again = TensorStore(tmp_path, "latents")
    assert "a" not in again and torch.equal(again["b"], torch.ones(4))
    assert "latents-00000.safetensors is damaged" in caplog.text
    again.add_shard({"a": torch.zeros(4)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latents-00001.safetensors",
        "latents-00002.safetensors",
    ]
