"""Digests detect damage to the files of a checkpoint, which is then quarantined."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from flax_cifar.run import integrity

FILES = {"state/manifest": b"m" * 40, "state/d/array": bytes(range(200)), "log/metadata": b"{}"}


@pytest.fixture
def checkpoint(tmp_path):
  path = tmp_path / "checkpoints" / "10"
  for name, content in FILES.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  (path / "commit_success.txt").write_text("Orbax writes this one later")
  integrity.write_digests(path)
  return path


def flip_bit(path, bit):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_an_unchanged_checkpoint_is_intact(checkpoint):
  (checkpoint / "commit_success.txt").write_text("changed")
  (checkpoint / "state" / "notes.txt").write_text("added by hand")
  assert integrity.find_damage(checkpoint) is None
  assert json.loads((checkpoint / integrity.DIGESTS).read_text()).keys() == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected(checkpoint, name):
  size = len(FILES[name])
  for bit in np.random.default_rng(0).choice(8 * size, min(8 * size, 50), replace=False):
    flip_bit(checkpoint / name, bit)
    assert integrity.find_damage(checkpoint) == f"{name} has changed"
    flip_bit(checkpoint / name, bit)
  assert integrity.find_damage(checkpoint) is None


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", [*FILES, integrity.DIGESTS])
def test_a_truncated_file_is_detected(checkpoint, name, keep):
  content = (checkpoint / name).read_bytes()
  end = len(content) // 2 if keep == 0.5 else keep
  (checkpoint / name).write_bytes(content[:end])
  # The last byte of the digests is a line feed, which does not matter.
  intact = name == integrity.DIGESTS and keep == -1
  assert (integrity.find_damage(checkpoint) is None) == intact


@pytest.mark.parametrize("name", [*FILES, integrity.DIGESTS])
def test_a_missing_file_is_detected(checkpoint, name):
  (checkpoint / name).unlink()
  reason = (
    "it was not written to its end"
    if name == integrity.DIGESTS
    else f"{name} cannot be read: No such"
  )
  assert integrity.find_damage(checkpoint).startswith(reason)


@pytest.mark.parametrize("content", ["[1]", "3", "null", '{"state/d/array": 7}', "\xff"])
def test_invalid_digests_are_detected(checkpoint, content):
  (checkpoint / integrity.DIGESTS).write_bytes(content.encode("latin-1"))
  assert integrity.find_damage(checkpoint)


def test_a_folder_in_the_place_of_a_file_is_detected(checkpoint):
  (checkpoint / "log" / "metadata").unlink()
  (checkpoint / "log" / "metadata").mkdir()
  assert "cannot be read" in integrity.find_damage(checkpoint)


def test_only_damaged_checkpoints_are_quarantined(checkpoint, tmp_path, capsys):
  folder, damaged = checkpoint.parent, tmp_path / "damaged"
  shutil.copytree(checkpoint, folder / "20")
  (folder / "20" / "state" / "d" / "array").write_bytes(b"")
  (folder / "99").mkdir()  # as a crashed program would leave it
  (folder / "30.orbax-checkpoint-tmp").mkdir()  # Orbax removes these
  (folder / "777").write_text("a file")
  lines = integrity.quarantine(folder, damaged)
  assert {path.name for path in folder.iterdir()} == {"10", "30.orbax-checkpoint-tmp", "777"}
  assert {path.name for path in damaged.iterdir()} == {"20", "99"}
  assert [line.split("'")[1].rsplit("/", 1)[1] for line in lines] == ["20", "99"]
  shown = capsys.readouterr().err
  assert "20' is damaged (state/d/array has changed); it is now" in shown
  assert "99' is damaged (it was not written to its end)" in shown


def test_repeated_quarantine_loses_nothing(checkpoint, tmp_path):
  folder, damaged = checkpoint.parent, tmp_path / "damaged"
  for name in ("10", "10-2", "10-3"):
    (folder / "10").mkdir(exist_ok=True)
    (folder / "10" / integrity.DIGESTS).unlink(missing_ok=True)
    integrity.quarantine(folder, damaged)
    assert (damaged / name).is_dir()


def test_quarantine_reaches_another_disk(checkpoint, tmp_path, monkeypatch):
  def refuse(source, target):
    raise OSError(errno.EXDEV, "Invalid cross-device link")

  (checkpoint / integrity.DIGESTS).unlink()
  monkeypatch.setattr(os, "rename", refuse)
  integrity.quarantine(checkpoint.parent, tmp_path / "damaged")
  assert (tmp_path / "damaged" / "10" / "state").is_dir()
  assert not checkpoint.exists()


def test_quarantine_accepts_a_missing_folder(tmp_path):
  assert integrity.quarantine(tmp_path / "none", tmp_path / "damaged") == []
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", ["absent", "begun", "complete"])
def test_an_interrupted_replacement_leaves_one_intact_checkpoint(checkpoint, new):
  """Wherever the process ends, `finish_replacements` leaves one intact checkpoint."""
  integrity.retire(checkpoint)
  assert not checkpoint.exists()
  if new != "absent":
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "manifest").write_bytes(b"new")
  if new == "complete":
    integrity.write_digests(checkpoint)
  for _ in range(2):
    integrity.finish_replacements(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["10"]
    assert integrity.find_damage(checkpoint) is None
    content = b"new" if new == "complete" else FILES["state/manifest"]
    assert (checkpoint / "state" / "manifest").read_bytes() == content
