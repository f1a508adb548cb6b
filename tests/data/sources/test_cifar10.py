"""CIFAR-10 from archives, prepared directories and mirrors, with a tiny substitute for the data."""

import errno
import fcntl
import json
import os
import pickle
import queue
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import (
  catalog,
  cifar10,
  cifar_archive,
  preparation,
  tfds_writer,
)
from tests import cifar10_files, mirror


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """CIFAR-10 with four images per batch, and without mirrors."""
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", cifar10_files.PER_BATCH)
  mirror.remove_all(monkeypatch)
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def pixel(row, y, x):
  return tuple(int(row[plane * 1024 + y * 32 + x]) for plane in range(3))


def assert_is_tiny(train, test):
  """Compares byte by byte with make_rows(), in archive order."""
  labels = np.concatenate([labels for labels, _ in cifar10_files.make_rows()])
  rows = np.concatenate([rows for _, rows in cifar10_files.make_rows()])
  images = np.concatenate([train.images, test.images])
  np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)
  for image, row in zip(images, rows, strict=True):
    for y, x in ((0, 0), (0, 31), (31, 0), (5, 17)):
      assert tuple(image[y, x].tolist()) == pixel(row, y, x)
  assert images.shape == (24, 32, 32, 3)
  assert images.dtype == np.uint8


def as_set(split):
  return {(image.tobytes(), int(label)) for image, label in zip(*vars(split).values(), strict=True)}


# ---- Archives


@pytest.mark.parametrize("name", cifar10_files.FORMATS)
def test_archive_and_unpacked_folder(tmp_path, name):
  path = cifar10_files.write_archive(tmp_path / name)
  assert_is_tiny(*cifar_archive.read_archive(path))
  with tarfile.open(path) as tar:
    tar.extractall(tmp_path, filter="data")
  assert_is_tiny(*cifar_archive.read_archive(tmp_path / cifar10_files.FORMATS[name][0]))


@pytest.mark.parametrize("place", ["", "downloads", "downloads/manual"])
def test_archive_is_found_prepared_and_read_again(tmp_path, place, capsys):
  path = cifar10_files.write_archive(tmp_path / place / "cifar-10-binary.tar.gz")
  first = cifar10.load_cifar10(dir=str(tmp_path))
  assert "Preparing" in capsys.readouterr().err
  path.unlink()
  second = cifar10.load_cifar10(dir=str(tmp_path))
  assert capsys.readouterr().err == ""
  assert first[2] == second[2] == cifar_archive.CLASS_NAMES
  for one, other in zip(first[:2], second[:2], strict=True):  # same order, too
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)
  train, test = cifar_archive.read_archive(cifar10_files.write_archive(path))
  assert as_set(train) == as_set(first[0])
  assert as_set(test) == as_set(first[1])


def test_dir_comes_from_the_environment_when_empty(tmp_path, monkeypatch):
  cifar10_files.write_archive(tmp_path / "env" / cifar_archive.ARCHIVE)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
  assert len(cifar10.load_cifar10(dir="")[0]) == 20
  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  shutil.move(tmp_path / "env", tmp_path / "tensorflow_datasets")
  assert len(cifar10.load_cifar10(dir="")[0]) == 20


def test_loading_works_even_if_preparing_fails(tmp_path, capsys):
  cifar10_files.write_archive(tmp_path / cifar_archive.ARCHIVE)
  (tmp_path / "cifar10").write_text("a file where the directory should be")
  train, _, _ = cifar10.load_cifar10(dir=str(tmp_path))
  assert len(train) == 20
  assert "Not prepared" in capsys.readouterr().err


class Evil:
  def __reduce__(self):
    return (os.mkdir, ("evil_was_here",))


def test_malicious_pickle_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blob = pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2)
  path = cifar10_files.write_archive(tmp_path / cifar_archive.ARCHIVE, {"data_batch_3": blob})
  with pytest.raises(errors.UserError, match=r"mkdir has no place in a CIFAR batch.*delete it"):
    cifar_archive.read_archive(path)
  assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("name", cifar10_files.FORMATS)
def test_truncated_archive(tmp_path, name, keep):
  path = cifar10_files.write_archive(tmp_path / name)
  blob = path.read_bytes()
  path.write_bytes(blob[: int(keep * len(blob)) if keep < 1 else keep])
  with pytest.raises(errors.UserError, match=f"{name} is damaged.*delete it"):
    cifar10.load_cifar10(dir=str(tmp_path))


def test_flipped_byte_in_an_archive(tmp_path):
  path = cifar10_files.write_archive(tmp_path / cifar_archive.ARCHIVE)
  blob = bytearray(path.read_bytes())
  blob[len(blob) // 2] ^= 1
  path.write_bytes(blob)
  with pytest.raises(errors.UserError, match="is damaged"):
    cifar_archive.read_archive(path)


@pytest.mark.parametrize(
  ("replace", "message"),
  [
    ({"test_batch.bin": None}, "cifar-10-batches-bin/test_batch.bin is not in it"),
    (
      {"data_batch_2.bin": cifar10_files.binary(*cifar10_files.make_rows()[0])[:-3073]},
      r"data_batch_2.bin holds .*\(3, 3072\)",
    ),
    ({"data_batch_2.bin": b"abc"}, "damaged"),
    ({"data_batch_5.bin": bytes([10]) + bytes(4 * 3073 - 1)}, "labels 0..10"),
  ],
)
def test_incomplete_archive(tmp_path, replace, message):
  path = cifar10_files.write_archive(tmp_path / "cifar-10-binary.tar.gz", replace)
  with pytest.raises(errors.UserError, match=message):
    cifar_archive.read_archive(path)


# ---- Prepared directories


@pytest.fixture
def prepared(tmp_path):
  path = cifar10_files.write_archive(tmp_path / "a" / cifar_archive.ARCHIVE)
  splits = cifar_archive.read_archive(path)
  return tfds_writer.prepare(catalog.CATALOG["cifar10"], splits, data_dir=tmp_path)


@pytest.mark.parametrize("convert", [lambda folder: None, cifar10_files.to_tfrecord])
def test_prepared_directory_in_either_format(tmp_path, prepared, convert):
  convert(prepared)
  train, test = cifar10.read_prepared(prepared)
  expected = cifar_archive.read_archive(tmp_path / "a" / cifar_archive.ARCHIVE)
  assert (as_set(train), as_set(test)) == tuple(as_set(split) for split in expected)


def test_newest_version_wins(tmp_path, prepared):
  assert cifar10.find_prepared(tmp_path) == prepared
  for name in ("3.0.10", "3.0.9", "4.0.0", "3.0.99.incomplete"):
    (tmp_path / "cifar10" / name).mkdir()
    shutil.copy(prepared / "dataset_info.json", tmp_path / "cifar10" / name)
  assert cifar10.find_prepared(tmp_path).name == "3.0.10"


@pytest.mark.parametrize("convert", [lambda folder: None, cifar10_files.to_tfrecord])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "count"])
def test_damaged_shard_is_named(tmp_path, prepared, convert, damage):
  convert(prepared)
  path = cifar10_files.shard(prepared)
  if damage == "missing":
    path.unlink()
  elif damage == "count":
    info = prepared / "dataset_info.json"
    info.write_text(info.read_text().replace('"20"', '"19"'))
  else:
    path.write_bytes(path.read_bytes()[: -9 if damage == "truncated" else 0])
  with pytest.raises(
    errors.UserError, match=f"{path.name} .*delete the directory {prepared}"
  ) as caught:
    cifar10.load_cifar10(dir=str(tmp_path))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["length", "payload", "checksum"])
def test_a_changed_bit_in_a_tfrecord_is_noticed(tmp_path, prepared, place):
  cifar10_files.to_tfrecord(prepared)
  path = cifar10_files.shard(prepared)
  blob = bytearray(path.read_bytes())
  blob[{"length": 0, "payload": 100, "checksum": 9}[place]] ^= 1
  path.write_bytes(blob)
  with pytest.raises(errors.UserError, match=f"{path.name} .*checksum of the record at byte"):
    cifar10.read_prepared(prepared)


def test_damaged_metadata_and_other_counts(tmp_path, prepared, monkeypatch):
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", 5)
  with pytest.raises(
    errors.UserError, match=r"20 training and 4 test images .*CIFAR-10 has 25 training and 5"
  ):
    cifar10.load_cifar10(dir=str(tmp_path))
  (prepared / "label.labels.txt").write_text("\n".join(reversed(cifar_archive.CLASS_NAMES)) + "\n")
  with pytest.raises(errors.UserError, match=r"test images .* of truck, ship.*; delete it and run"):
    cifar10.load_cifar10(dir=str(tmp_path))
  (prepared / "dataset_info.json").write_text("{")
  with pytest.raises(errors.UserError, match=r"dataset_info\.json.*delete"):
    cifar10.load_cifar10(dir=str(tmp_path))
  (prepared / "dataset_info.json").write_text(json.dumps({"name": "cifar10", "version": "3.0.2"}))
  with pytest.raises(errors.UserError, match=r"dataset_info\.json.*delete"):
    cifar10.load_cifar10(dir=str(tmp_path))


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_damaged_class_names_are_named(prepared, content):
  file = prepared / "label.labels.txt"
  file.unlink() if content is None else file.write_bytes(content)
  with pytest.raises(errors.UserError, match=rf"{prepared}.*; delete .*again"):
    cifar10.read_prepared(prepared)


@pytest.mark.parametrize("file_format", ["riegeli", "parquet", "later"])
def test_another_format_is_refused_without_advice_to_delete(prepared, file_format):
  info = prepared / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", file_format))
  with pytest.raises(
    errors.UserError, match=f"in the format '{file_format}'.*another data.dir"
  ) as caught:
    cifar10.read_prepared(prepared)
  assert "delete" not in str(caught.value)


# ---- Downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
  blob = cifar10_files.write_archive(tmp_path / "served" / cifar_archive.ARCHIVE).read_bytes()
  mirror.expect(monkeypatch, "cifar10", 0, blob)
  with mirror.serve({"": blob}) as httpd:
    yield httpd


def test_download_prepares_and_leaves_no_part(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "good")
  train, test, _ = cifar10.load_cifar10(dir=str(tmp_path / "new" / "dir"))
  expected = cifar_archive.read_archive(tmp_path / "served" / cifar_archive.ARCHIVE)
  assert (as_set(train), as_set(test)) == tuple(as_set(split) for split in expected)
  names = {path.name for path in (tmp_path / "new" / "dir").iterdir()}
  assert {cifar_archive.ARCHIVE, "cifar10"} <= names
  assert not any(name.endswith(".part") for name in names)
  cifar10.load_cifar10(dir=str(tmp_path / "new" / "dir"))
  assert len(server.seen) == 1


def test_a_second_first_run_waits_for_the_first(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "good")
  root, printed = tmp_path / "new", queue.Queue()
  monkeypatch.setattr(preparation, "report", printed.put)
  splits = cifar_archive.read_archive(tmp_path / "served" / cifar_archive.ARCHIVE)
  with ThreadPoolExecutor(1) as pool:
    with preparation.lock(catalog.CATALOG["cifar10"], root):
      second = pool.submit(cifar10.load_cifar10, dir=str(root))
      assert printed.get(timeout=10).startswith("Waiting for another process")
      tfds_writer.prepare(catalog.CATALOG["cifar10"], splits, data_dir=root)
    train, test, _ = second.result(timeout=10)
  assert (as_set(train), as_set(test)) == tuple(as_set(split) for split in splits)
  assert printed.empty()
  assert server.seen == []


def test_a_wrong_folder_is_left_as_it_was(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "missing")
  (tmp_path / "mine").mkdir()
  for folder in (tmp_path / "mine", tmp_path / "typo" / "deep"):
    with pytest.raises(errors.UserError):
      cifar10.load_cifar10(dir=str(folder))
  assert sorted(tmp_path.iterdir()) == [tmp_path / "mine", tmp_path / "served"]
  assert list((tmp_path / "mine").iterdir()) == []


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
  def refuse(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", refuse)
  cifar10_files.write_archive(tmp_path / cifar_archive.ARCHIVE)
  assert len(cifar10.load_cifar10(dir=str(tmp_path))[0]) == 20


# ---- Order


def test_order_does_not_depend_on_the_source():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
  images[10] = images[20]  # equal images with different labels
  split = dataset.Split(images, np.arange(30, dtype=np.int32))
  order = rng.permutation(30)
  shuffled = dataset.Split(images[order], split.labels[order])
  one, other = cifar10._sort_by_pixels(split), cifar10._sort_by_pixels(shuffled)
  np.testing.assert_array_equal(one.labels, other.labels)
  np.testing.assert_array_equal(one.images, images[one.labels])
