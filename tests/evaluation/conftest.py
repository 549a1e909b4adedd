"""Small models on disk, written once for all tests of judges."""

import pytest
import small_clips


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return small_clips.write_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory):
    return small_clips.write_classifier(tmp_path_factory.mktemp("judges") / "classifier")
