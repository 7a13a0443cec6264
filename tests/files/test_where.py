"""A local path of a setting: the same place from then on, wherever the program goes."""

import re
from pathlib import Path, PurePath

import pytest

from evsys_bus.errors import EvsysBusError, SettingError
from evsys_bus.location import local_path


def test_a_relative_path_is_absolute_from_then_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = local_path("sweeps/7", "output_dir")
    monkeypatch.chdir("/")
    assert found == tmp_path / "sweeps/7"
    assert local_path(PurePath("/a/b"), "output_dir") == Path("/a/b")


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/sweeps", "output_dir") == tmp_path / "sweeps"
    assert local_path(Path("~"), "output_dir") == tmp_path
    assert local_path("/data/~old", "output_dir") == Path("/data/~old")


def test_the_home_directory_of_nobody_is_refused():
    with pytest.raises(SettingError, match="output_dir is '~nobody-of-that-name/x'"):
        local_path("~nobody-of-that-name/x", "output_dir")


@pytest.mark.parametrize("text", ["az://box/sweeps", "hdfs+x://n", Path("r2://box/x"), "file:///data/x"])
def test_a_url_is_refused_with_what_to_do(text):
    with pytest.raises(ValueError, match=re.escape("directory is ")) as caught:
        local_path(text, "directory")
    assert isinstance(caught.value, EvsysBusError)
    assert "local" in caught.value.fix


def test_a_colon_in_a_name_is_no_url(tmp_path):
    for name in ("run:1", "a:/b", "12:30/x", "sweep/az://x"):
        assert local_path(f"{tmp_path}/{name}", "directory") == tmp_path / name
    assert local_path("run:1", "directory").name == "run:1"
