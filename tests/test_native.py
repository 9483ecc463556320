"""Compiled libraries: where they are kept when a home folder cannot be written."""

import os
import tempfile
from pathlib import Path

import pytest

from anorm.native import BuildError, Library, cache_folders

CODE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.delenv("ANORM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "answer.cpp").write_text(CODE)
    return Library("answer", tmp_path, {"answer.cpp": "-O1"}, flags=("-fPIC",))


def test_without_a_home_that_can_be_written_it_lies_among_temporary_files(library, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    path = library.compiled()
    assert path.parent == Path(tempfile.gettempdir()) / f"anorm-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    built = path.stat().st_mtime_ns
    assert library.compiled() == path and path.stat().st_mtime_ns == built


def test_one_that_lies_in_a_home_that_cannot_be_written_is_used(library, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = library.compiled()
    assert path.parent == tmp_path / "home" / ".cache" / "anorm"
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: pytest.fail("nothing may be written"))
    assert library.compiled() == path


def test_what_somebody_else_may_have_put_there_is_not_loaded(library, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    folder = cache_folders()[-1]
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BuildError, match="cannot write to /dev/null.*set ANORM_CACHE"):
        library.compiled()
    folder.rmdir()
    folder.symlink_to(folder.parent)
    with pytest.raises(BuildError, match="set ANORM_CACHE"):
        library.compiled()


def test_the_folder_that_was_asked_for_is_the_only_one(library, monkeypatch):
    monkeypatch.setenv("ANORM_CACHE", "/dev/null/cache")
    with pytest.raises(BuildError, match="cannot write to /dev/null/cache"):
        library.compiled()
