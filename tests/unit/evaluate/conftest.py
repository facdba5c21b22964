import shutil

import pytest

from tests.helpers_resume import EVERYTHING, again, unfinished


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A finished evaluation with a cache."""
    folder = tmp_path_factory.mktemp("warm")
    assert again(folder)[0] == EVERYTHING
    assert unfinished(folder) == []
    return folder


@pytest.fixture
def place(warm, tmp_path):
    """A copy of its cache."""
    shutil.copytree(warm / "cache", tmp_path / "run" / "cache", copy_function=shutil.copy2)
    return tmp_path / "run"
