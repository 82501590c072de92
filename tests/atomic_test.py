import os

import pytest

from glscl_jax import atomic


def test_a_file_is_replaced_whole(tmp_path):
  path = tmp_path / "file"
  atomic.write_text(path, "old")
  atomic.write_text(path, "new")
  assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
  target = tmp_path / "deep" / "target"
  for text in ("old", "new"):
    with atomic.new_folder(target) as whole:
      (whole.parent / "on the way").write_text("scrap")
      whole.mkdir()
      (whole / "file").write_text(text)
      if text == "new":
        assert (target / "file").read_text() == "old"
  assert (target / "file").read_text() == "new"
  assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_of_the_same_number_left_is_cleared(tmp_path):
  target = tmp_path / "target"
  stale = tmp_path / f"target.tmp-{os.getpid()}"
  (stale / "whole").mkdir(parents=True)
  with atomic.new_folder(target) as whole:
    whole.mkdir()
  assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
  target = tmp_path / "target"
  target.mkdir()
  (target / "file").write_text("old")
  with pytest.raises(RuntimeError), atomic.new_folder(target) as whole:
    whole.mkdir()
    raise RuntimeError
  assert (target / "file").read_text() == "old"
  assert list(tmp_path.iterdir()) == [target]
