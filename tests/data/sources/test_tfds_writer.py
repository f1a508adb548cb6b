"""TensorFlow Datasets reads the output of prepare, which is complete or absent."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_cifar.data import dataset
from flax_cifar.data.sources import catalog, tfds_writer

SIZES = {"train": 30, "test": 7}


def make_split(seed, n):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
  return dataset.Split(images, rng.integers(0, 10, n).astype(np.int32))


def prepare(splits, root):
  return tfds_writer.prepare(catalog.CATALOG["cifar10"], tuple(splits.values()), data_dir=root)


@pytest.fixture(scope="module")
def splits():
  return {name: make_split(i, n) for i, (name, n) in enumerate(SIZES.items())}


@pytest.fixture(scope="module")
def prepared(splits, tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  return root, prepare(splits, root)


def test_plain_tfds_reads_the_same_pixels_and_labels(prepared, splits):
  root, folder = prepared
  assert folder == root / "cifar10" / "3.0.2"
  sources = tfds.data_source("cifar10", data_dir=root, download=False)
  for name, split in splits.items():
    assert len(sources[name]) == SIZES[name]
    indices = []
    for example in sources[name]:
      prefix, _, number = example["id"].decode().partition("_")
      indices.append(int(number))
      assert (prefix, len(number)) == (name, 5)
      np.testing.assert_array_equal(example["image"], split.images[indices[-1]])
      assert example["label"] == split.labels[indices[-1]]
    assert sorted(indices) == list(range(SIZES[name]))


def test_metadata_is_that_of_the_official_builder(prepared):
  _, folder = prepared
  ours = tfds.builder_from_directory(folder).info
  official = tfds.builder("cifar10", data_dir=folder.parent.parent / "nowhere").info
  assert repr(ours.features) == repr(official.features)
  assert (ours.name, ours.version) == (official.name, official.version)
  assert ours.supervised_keys == official.supervised_keys
  assert ours.citation == official.citation
  assert ours.file_format == tfds.core.FileFormat.ARRAY_RECORD
  names = "airplane automobile bird cat deer dog frog horse ship truck"
  assert " ".join(ours.features["label"].names) == names


def test_preparing_uses_no_network_and_prints_nothing(splits, tmp_path, monkeypatch, capfd):
  def connect(*args):
    raise AssertionError("a connection was opened")

  monkeypatch.setattr(socket.socket, "connect", connect)
  prepare(splits, tmp_path)
  assert capfd.readouterr() == ("", "")


def test_interrupted_preparation_leaves_nothing_that_looks_prepared(splits, tmp_path, monkeypatch):
  def fail(image):
    raise OSError("disk full")

  monkeypatch.setattr(tfds_writer, "_png", fail)
  with pytest.raises(OSError, match="disk full"):
    prepare(splits, tmp_path)
  assert list(tmp_path.glob("cifar10/3*/*")) == []
  monkeypatch.undo()
  killed = tmp_path / "cifar10" / "incomplete.A1B2C3_3.0.2"  # as TFDS calls it
  writing = killed.with_name("incomplete.D4E5F6_3.0.2")
  for path in (killed, writing):
    path.mkdir(parents=True)
  os.utime(killed, (0, time.time() - 2 * tfds_writer.DAY))
  folder = prepare(splits, tmp_path)
  assert {*folder.parent.iterdir()} == {folder, writing}


WRITE_WITH_A_LIMIT = """
import resource, sys
import numpy as np
from flax_cifar.data.sources import catalog, tfds_writer
from flax_cifar.data.dataset import Split
split = Split(np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9, np.int32))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  tfds_writer.prepare(catalog.CATALOG["cifar10"], (split, split), data_dir=sys.argv[1])
except OSError as error:
  print(error)
"""


def test_a_write_that_fails_is_an_oserror(tmp_path):
  """Limits the size of files; array_record itself raises another kind of error."""
  command = [sys.executable, "-c", WRITE_WITH_A_LIMIT, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert "File too large" in done.stdout, done.stderr
  assert done.stdout.count("\n") == 1
  assert list(tmp_path.glob("cifar10/*")) == []


def test_an_empty_directory_is_not_mistaken_for_a_prepared_one(splits, tmp_path):
  (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
  with pytest.raises(FileExistsError, match="delete it"):
    prepare(splits, tmp_path)


def test_the_builder_of_tfds_stays_registered_and_tensorflow_is_not_imported():
  code = """
import sys
import tensorflow_datasets as tfds
from flax_cifar.data.sources import cifar10, tfds_writer
assert tfds.builder_cls("cifar10").__module__ == "tensorflow_datasets.image_classification.cifar"
assert "tensorflow" not in sys.modules
"""
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
