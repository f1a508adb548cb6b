"""Decoded CIFAR-10 in the cache: what is kept, and when it is decoded again."""

import json
import os

import numpy as np
import pytest

from flax_cifar.data import dataset
from flax_cifar.data.sources import decoded


@pytest.fixture
def source(tmp_path, monkeypatch):
  """A folder with a file, and a cache that nothing else uses."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  folder = tmp_path / "prepared"
  folder.mkdir()
  (folder / "shard").write_bytes(b"pixels")
  return folder


def create_splits(seed):
  rng = np.random.default_rng(seed)
  return tuple(
    dataset.Split(
      rng.integers(0, 256, (count, 4, 4, 3), np.uint8), rng.integers(0, 10, count).astype(np.int32)
    )
    for count in (7, 3)
  )


class Decoder:
  """Counts how often it is called; each time it returns other splits."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return create_splits(self.calls)


def assert_same(actual, expected):
  for one, two in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert (one.images.dtype, one.labels.dtype) == (np.uint8, np.int32)


def find(tmp_path, name):
  (path,) = (tmp_path / "cache").rglob(name)
  return path


def test_a_second_start_reads_what_the_first_one_decoded(source):
  decode = Decoder()
  first = decoded.load_or_decode(source, decode, form="")
  second = decoded.load_or_decode(source, decode, form="")
  assert decode.calls == 1
  assert_same(second, first)
  assert not second[0].images.flags.writeable


def change_content(source, tmp_path):
  (source / "shard").write_bytes(b"others")


def change_time(source, tmp_path):
  os.utime(source / "shard", ns=(1, 1))


def add_a_file(source, tmp_path):
  (source / "another").touch()


def flip_a_pixel(source, tmp_path):
  path = find(tmp_path, "train_images.npy")
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def cut_the_labels(source, tmp_path):
  path = find(tmp_path, "test_labels.npy")
  path.write_bytes(path.read_bytes()[:-1])


def remove_the_images(source, tmp_path):
  find(tmp_path, "train_images.npy").unlink()


def empty_the_description(source, tmp_path):
  find(tmp_path, "content.json").write_text("")


def damage_the_description(source, tmp_path):
  path = find(tmp_path, "content.json")
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, "sha256": None}))


CHANGES = [change_content, change_time, add_a_file, flip_a_pixel, cut_the_labels]
CHANGES += [remove_the_images, empty_the_description, damage_the_description]


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_decoded_again_after(change, source, tmp_path):
  decode = Decoder()
  decoded.load_or_decode(source, decode, form="")
  change(source, tmp_path)
  again = decoded.load_or_decode(source, decode, form="")
  assert decode.calls == 2
  assert_same(again, create_splits(2))
  assert_same(decoded.load_or_decode(source, decode, form=""), again)
  assert decode.calls == 2


def test_data_in_another_folder_are_kept_apart(source, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  decode = Decoder()
  decoded.load_or_decode(source, decode, form="")
  decoded.load_or_decode(other, decode, form="")
  assert_same(decoded.load_or_decode(source, decode, form=""), create_splits(1))


def test_two_forms_of_the_same_files_are_kept_apart(source):
  decode = Decoder()
  for form, number in (("", 1), ("sorted", 2), ("", 1)):
    found = decoded.load_or_decode(source, decode, form=form)
    assert_same(found, create_splits(number))


def test_the_name_of_a_folder_need_not_be_utf8(source):
  other = source.with_name(os.fsdecode(b"gr\xfc\xdfe"))
  source.rename(other)
  decode = Decoder()
  for _ in range(2):
    assert_same(decoded.load_or_decode(other, decode, form=""), create_splits(1))


def test_without_a_cache_it_is_decoded_each_time(source, monkeypatch):
  monkeypatch.setattr("flax_cifar.environment.find_cache", lambda kind: "")
  decode = Decoder()
  for _ in range(2):
    decoded.load_or_decode(source, decode, form="")
  assert decode.calls == 2


def test_a_full_disk_is_a_warning(source, monkeypatch, capsys):
  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "save", fail)
  assert_same(decoded.load_or_decode(source, Decoder(), form=""), create_splits(1))
  assert "not kept decoded" in capsys.readouterr().err


def test_a_decoders_error_leaves_nothing_behind(source, tmp_path):
  def fail():
    raise ValueError("damaged")

  with pytest.raises(ValueError, match="damaged"):
    decoded.load_or_decode(source, fail, form="")
  assert not (tmp_path / "cache").exists()
