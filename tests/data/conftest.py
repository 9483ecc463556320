import pytest
from photographs import write_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """File indices of a test stay in its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")
