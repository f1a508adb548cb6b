"""Files that are written whole or not at all."""

import os

from flax_cifar import files


def test_processes_that_write_a_file_at_once_do_not_mix(tmp_path, monkeypatch):
  path = tmp_path / "table.json"
  with files.replace(path) as first:
    first.write_text("first")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    files.write_text(path, "second, and longer")
    assert path.read_text() == "second, and longer"
  assert path.read_text() == "first"
  assert list(tmp_path.iterdir()) == [path]
