"""Q16's vectors: JSON, safetensors, and the published pickle, whose numbers are taken without running it."""

import hashlib
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.evaluation.judges.q16_vectors import read_vectors, write_vectors


def _pickle_of(numbers: np.ndarray) -> bytes:
    """The opcodes of the published prompts.p around other numbers: numpy's own pickle, protocol 3."""
    return pickle.dumps(numbers.astype("<f2"), protocol=3)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def numbers():
    return np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16)


def test_the_pickles_numbers_are_taken_as_they_are(tmp_path, numbers):
    path = tmp_path / "prompts.p"
    path.write_bytes(_pickle_of(numbers))

    found = read_vectors(path, _sha256(path.read_bytes())).weights

    assert np.array_equal(found.numpy(), pickle.loads(path.read_bytes()).astype(np.float32))


def test_a_pickle_of_another_hash_is_not_even_walked(tmp_path, numbers):
    path = tmp_path / "prompts.p"
    path.write_bytes(_pickle_of(numbers))

    with pytest.raises(InputError, match=r"is not the file that Q16 published.*pickles stay closed"):
        read_vectors(path)


class _Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("with_payload", [False, True])
def test_a_hostile_pickle_never_runs_even_with_the_right_hash(tmp_path, numbers, with_payload):
    path, proof = tmp_path / "prompts.p", tmp_path / "it ran"
    payload = [numbers.astype("<f2").tobytes()] if with_payload else []
    data = pickle.dumps([_Hostile(proof), *payload], protocol=3)
    path.write_bytes(data)

    if with_payload:
        assert np.array_equal(read_vectors(path, _sha256(data)).weights.numpy(), numbers.astype(np.float32))
    else:
        with pytest.raises(InputError, match="does not hold 1536"):
            read_vectors(path, _sha256(data))
    with pytest.raises(InputError, match="pickles stay closed"):
        read_vectors(path)
    assert not proof.exists()
    pickle.loads(data)  # that it would have run
    assert proof.exists()


def test_json_safetensors_and_pickle_of_the_same_numbers_are_the_same_vectors(tmp_path, numbers):
    (tmp_path / "a.p").write_bytes(_pickle_of(numbers))
    (tmp_path / "a.json").write_text(json.dumps(numbers.astype(float).tolist()))
    write_vectors(tmp_path / "a.safetensors", torch.from_numpy(numbers), None, {})

    found = [
        read_vectors(tmp_path / f"a.{kind}", _sha256(_pickle_of(numbers))) for kind in ("p", "json", "safetensors")
    ]

    assert len({vectors.sha256 for vectors in found}) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "read from .safetensors and .json"),
        ("a.json", b"[[1, 2], [3]]", "not a JSON list"),
        ("a.json", b"[1, 2]", r"shape \[2\], not two vectors"),
        ("a.json", b"[[1, 2], [3, NaN]]", "holds no number"),
        ("a.json", b"[[1, 2], [0, 0]]", "only zeros"),
        ("a.json", b"[[[[", "not a JSON list"),
        ("a.json", b'{"a": 1}', "not a JSON list"),
        ("a.safetensors", struct.pack("<Q", 99) + b"{", "safetensors"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_vectors(tmp_path / "a.json")
