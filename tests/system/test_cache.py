"""A directory counts as private only if nobody else can write to it or put another one in its place."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import UserError
from minilora.system.cache import check_private, private_cache

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
needs_root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root gives files away")
SOMEBODY = 54321  # the id of a user who is neither root nor this one


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask():
    """Files are made as open as can be."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_a_new_cache_is_private_whatever_the_umask(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    cache = private_cache()
    assert cache == tmp_path / "home" / ".cache" / "minilora"
    assert mode(cache) == mode(cache.parent) == 0o700


@pytest.mark.parametrize("given", [0o775, 0o777, 0o757, 0o1777])
def test_a_cache_that_others_may_write_loses_this_permission_and_no_other(monkeypatch, tmp_path, given):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "minilora").mkdir()
    (tmp_path / "minilora").chmod(given)
    (tmp_path / "minilora" / "kept").touch()
    assert mode(private_cache()) == given & ~0o022 and (tmp_path / "minilora" / "kept").exists()


def test_the_directories_around_the_cache_are_never_changed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match=f"other users may write to {tmp_path}; .*chmod go-w {tmp_path}"):
        check_private(private_cache())
    assert mode(tmp_path) == 0o777


def test_without_xdg_cache_home_the_cache_lies_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for empty in (
        lambda: monkeypatch.delenv("XDG_CACHE_HOME", False),
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
    ):
        empty()
        assert private_cache() == tmp_path / ".cache" / "minilora"


def test_without_a_home_directory_one_line_says_what_to_set(monkeypatch):
    import pwd

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container whose user is in no file
    with pytest.raises(UserError, match="no home directory.* set HOME or XDG_CACHE_HOME"):
        private_cache()


def test_a_file_where_the_cache_should_be_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "minilora").touch()
    for home in (tmp_path / "file", tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        with pytest.raises(UserError, match=f"{home}/minilora cannot be a cache .* set XDG_CACHE_HOME"):
            private_cache()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(modes=st.lists(st.sampled_from([0o700, 0o755, 0o775, 0o757, 0o1777, 0o1700]), min_size=1, max_size=4))
def test_a_path_is_as_private_as_the_weakest_of_its_parts(tmp_path_factory, modes):
    directory = tmp_path_factory.mktemp("path")
    for number, bits in enumerate(modes):
        directory = directory / str(number)
        directory.mkdir()
        directory.chmod(bits)
    # A sticky directory protects what lies in it, but others may add to it.
    is_private = all(bits in (0o700, 0o755, 0o1777, 0o1700) for bits in modes) and modes[-1] != 0o1777
    if is_private:
        check_private(directory)
    else:
        with pytest.raises(UserError, match="other users may write to .*/[0-3]; "):
            check_private(directory)


def test_the_target_of_a_link_is_checked_part_by_part(tmp_path):
    (tmp_path / "open" / "inside").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "link").symlink_to("open/inside")
    (tmp_path / "private" / "up").symlink_to("../link")
    check_private(tmp_path / "private" / "up")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match=f"other users may write to {tmp_path}/private/../open;"):
        check_private(tmp_path / "private" / "up")


def test_links_in_a_circle_and_missing_directories_are_errors_of_the_system(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for name in ("circle", "missing"):
        with pytest.raises(OSError):
            check_private(tmp_path / name / "inside")


@needs_root
def test_a_directory_or_a_link_of_another_user_is_refused(tmp_path):
    (tmp_path / "theirs" / "inside").mkdir(parents=True)
    (tmp_path / "ours").mkdir()
    (tmp_path / "link").symlink_to("ours")
    check_private(tmp_path / "link")
    os.chown(tmp_path / "theirs", SOMEBODY, -1)
    os.chown(tmp_path / "link", SOMEBODY, -1, follow_symlinks=False)
    for path, part in ((tmp_path / "theirs" / "inside", "theirs"), (tmp_path / "link", "link")):
        with pytest.raises(UserError, match=f"{tmp_path}/{part} belongs to another user; set XDG_CACHE_HOME"):
            check_private(path)


@needs_root
def test_a_cache_of_another_user_keeps_its_permissions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "minilora").mkdir()
    (tmp_path / "minilora").chmod(0o777)
    os.chown(tmp_path / "minilora", SOMEBODY, -1)
    assert mode(private_cache()) == 0o777
