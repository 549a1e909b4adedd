"""FID: torch-fidelity as the oracle of the distance and of the features, and when it is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safetensors.torch import save_file
from safety_experts.commands import run as command
from safety_experts.errors import InputError
from safety_experts.evaluation import inception
from safety_experts.evaluation.distances import FRECHET_MIN, frechet, kid
from safety_experts.evaluation.evaluate import run
from safety_experts.evaluation.inception import Inception, Reference, check_enough, fid_rows, measure_fid

fidelity = pytest.importorskip("torch_fidelity")


def _normal(seed, n, d, mean=0.0, spread=1.0):
    return mean + spread * np.random.default_rng(seed).normal(size=(n, d))


def test_the_frechet_distance_is_torch_fidelitys():
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    x, y = _normal(0, 300, 24), _normal(1, 300, 24, 0.3, 1.4) @ np.diag(np.linspace(0.1, 2, 24))
    statistics = [fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
    assert frechet(x, y) == pytest.approx(fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID], rel=1e-9)


def test_kid_is_torch_fidelitys_without_terms_of_one_prompt():
    from torch_fidelity.metric_kid import kernel_poly, mmd2

    x, y = _normal(2, 40, 12), _normal(3, 40, 12, 0.2)
    kernel = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    terms = [kernel_poly(a, b, **kernel) for a, b in ((x, x), (x, y), (y, y))]
    assert kid(x, y).value == pytest.approx(mmd2(*terms, mmd_est="u-statistic"), rel=1e-9)


def test_fid_of_normal_features_is_what_the_formula_says_and_needs_2048():
    n, d, gap, spread = FRECHET_MIN, 3, 0.7, 1.8
    vectors = {
        "base": {("list", str(k), 0): row for k, row in enumerate(_normal(4, n, d))},
        "arm": {("list", str(k), 0): row for k, row in enumerate(_normal(5, n, d, gap, spread))},
    }
    rows = fid_rows(vectors, "planted", _normal(6, n + 5, d), "0" * 8)
    found = {(row.arm, row.against): row for row in rows}
    assert set(found) == {("base", "reference"), ("arm", "base"), ("arm", "reference")}
    expected = d * gap**2 + d * (1 - spread) ** 2
    assert found["arm", "base"].value == pytest.approx(expected, rel=0.1)
    assert found["arm", "reference"].value == pytest.approx(expected, rel=0.1)
    assert found["base", "reference"].value == pytest.approx(0, abs=0.02)
    assert found["arm", "base"].variant == "fid:planted|n 2048/2048|base"
    del vectors["arm"]["list", "7", 0]
    assert [row.arm for row in fid_rows(vectors, "planted", np.zeros((0, d)), "")] == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Inception with random weights as a file of the user's, and the module they are of."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:  # torch-fidelity makes none without a download
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        theirs = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, path)
    return path, theirs


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity_with_these_weights(weights):
    path, theirs = weights
    ours = Inception(path)
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 48 + n, 3), np.uint8)) for n in (0, 9)]
    found = ours.embed_images(images)
    for image, row in zip(images, found, strict=True):
        (expected,) = theirs(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
        assert row == pytest.approx(expected[0].numpy(), rel=1e-5, abs=1e-6)
    assert found.shape == (2, 2048) and not np.allclose(*found)
    assert ours.version.startswith("inception-tf2015:") and "torch-fidelity 0." in ours.version


def test_other_weights_are_a_one_line_error(tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not the tensors of FID's Inception; convert"):
        Inception(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"read from \.safetensors"):
        Inception(tmp_path / "pt_inception.pth")


class _Colours:
    version, batch_size = "colours", 5

    def embed_images(self, images):
        return np.array([np.asarray(image.resize((2, 1))).reshape(-1) / 255 for image in images])


def test_fid_reaches_the_report_beside_other_distances(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "FRECHET_MIN", 8)
    folder, reference = tmp_path / "run", tmp_path / "reference"
    run(folder, toy_plan(toy_suite(6)), RenderedArms(), [toy_oracle()])
    other = {"arm": "half", "against": "base", "metric": "kid", "variant": "kid:x", "n": 12, "value": 0.0}
    (folder / "distances.json").write_text(json.dumps([other | {"low": None, "high": None}]))
    reference.mkdir()
    for number in range(14):
        Image.new("RGB", (64, 64), (number * 9, 40, 200)).save(reference / f"{number}.jpg")
    assert measure_fid(folder, _Colours(), Reference.of_folder(reference))
    assert not measure_fid(folder, _Colours(), should_stop=lambda: True)
    assert command(["evaluate", "--from", str(folder)]) == 0
    rows = json.loads((folder / "report.json").read_text())["distances"]
    assert {(row["metric"], row["arm"], row["against"]) for row in rows} == {
        ("kid", "half", "base"), ("fid", "half", "base"), ("fid", "null", "base"),
        ("fid", "base", "reference"), ("fid", "half", "reference"), ("fid", "null", "reference"),
    }  # fmt: skip
    half = next(row for row in rows if (row["metric"], row["arm"], row["against"]) == ("fid", "half", "base"))
    assert half["value"] == pytest.approx(0, abs=1e-6)  # safe pictures are the same there
    assert "fid:colours|n 12/12|base, to the base model" in (folder / "report.html").read_text()


def test_too_few_pictures_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(InputError, match="needs 2048 pictures of safe prompts an arm, here are 400"):
        check_enough(400, None)
    with pytest.raises(InputError, match="an arm has 3000, the reference folder 2"):
        check_enough(3000, Reference((tmp_path, tmp_path)))
    with pytest.raises(InputError, match="holds no pictures"):
        Reference.of_folder(tmp_path)
