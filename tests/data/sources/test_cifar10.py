"""CIFAR-10 from archives, prepared directories and mirrors, with a tiny substitute for the data."""

import errno
import fcntl
import hashlib
import http.server
import json
import os
import pickle
import queue
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import cifar10, cifar10_archive, cifar10_download, cifar10_tfds
from tests import cifar10_files


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """CIFAR-10 with four images per batch, and without mirrors."""
  monkeypatch.setattr(cifar10_archive, "BATCH_SIZE", cifar10_files.PER_BATCH)
  monkeypatch.setattr(cifar10_download, "MIRRORS", ())
  monkeypatch.delenv("FLAX_CIFAR_MIRROR", raising=False)
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
  assert_is_tiny(*cifar10_archive.read_archive(path))
  with tarfile.open(path) as tar:
    tar.extractall(tmp_path, filter="data")
  assert_is_tiny(*cifar10_archive.read_archive(tmp_path / cifar10_files.FORMATS[name][0]))


@pytest.mark.parametrize("place", ["", "downloads", "downloads/manual"])
def test_archive_is_found_prepared_and_read_again(tmp_path, place, capsys):
  path = cifar10_files.write_archive(tmp_path / place / "cifar-10-binary.tar.gz")
  first = cifar10.load_cifar10(dir=str(tmp_path))
  assert "Preparing" in capsys.readouterr().err
  path.unlink()
  second = cifar10.load_cifar10(dir=str(tmp_path))
  assert capsys.readouterr().err == ""
  assert first[2] == second[2] == cifar10_archive.CLASS_NAMES
  for one, other in zip(first[:2], second[:2], strict=True):  # same order, too
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)
  train, test = cifar10_archive.read_archive(cifar10_files.write_archive(path))
  assert as_set(train) == as_set(first[0])
  assert as_set(test) == as_set(first[1])


def test_dir_comes_from_the_environment_when_empty(tmp_path, monkeypatch):
  cifar10_files.write_archive(tmp_path / "env" / cifar10_archive.ARCHIVE)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
  assert len(cifar10.load_cifar10(dir="")[0]) == 20
  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  shutil.move(tmp_path / "env", tmp_path / "tensorflow_datasets")
  assert len(cifar10.load_cifar10(dir="")[0]) == 20


def test_loading_works_even_if_preparing_fails(tmp_path, capsys):
  cifar10_files.write_archive(tmp_path / cifar10_archive.ARCHIVE)
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
  path = cifar10_files.write_archive(tmp_path / cifar10_archive.ARCHIVE, {"data_batch_3": blob})
  with pytest.raises(errors.UserError, match=r"mkdir has no place in a CIFAR batch.*delete it"):
    cifar10_archive.read_archive(path)
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
  path = cifar10_files.write_archive(tmp_path / cifar10_archive.ARCHIVE)
  blob = bytearray(path.read_bytes())
  blob[len(blob) // 2] ^= 1
  path.write_bytes(blob)
  with pytest.raises(errors.UserError, match="is damaged"):
    cifar10_archive.read_archive(path)


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
    cifar10_archive.read_archive(path)


# ---- Prepared directories


@pytest.fixture
def prepared(tmp_path):
  train, test = cifar10_archive.read_archive(
    cifar10_files.write_archive(tmp_path / "a" / cifar10_archive.ARCHIVE)
  )
  return cifar10_tfds.prepare_cifar10(train=train, test=test, data_dir=tmp_path)


@pytest.mark.parametrize("convert", [lambda folder: None, cifar10_files.to_tfrecord])
def test_prepared_directory_in_either_format(tmp_path, prepared, convert):
  convert(prepared)
  train, test = cifar10_tfds.read_prepared(prepared)
  expected = cifar10_archive.read_archive(tmp_path / "a" / cifar10_archive.ARCHIVE)
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
    cifar10_tfds.read_prepared(prepared)


def test_damaged_metadata_and_other_counts(tmp_path, prepared, monkeypatch):
  monkeypatch.setattr(cifar10_archive, "BATCH_SIZE", 5)
  with pytest.raises(
    errors.UserError, match="20 training and 4 test images, CIFAR-10 has 25 and 5"
  ):
    cifar10.load_cifar10(dir=str(tmp_path))
  (prepared / "label.labels.txt").write_text(
    "\n".join(reversed(cifar10_archive.CLASS_NAMES)) + "\n"
  )
  with pytest.raises(errors.UserError, match=r"label\.labels\.txt"):
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
  with pytest.raises(
    errors.UserError, match=rf"label\.labels\.txt is missing, .*directory {prepared}"
  ):
    cifar10_tfds.read_prepared(prepared)


@pytest.mark.parametrize("file_format", ["riegeli", "parquet", "later"])
def test_another_format_is_refused_without_advice_to_delete(prepared, file_format):
  info = prepared / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", file_format))
  with pytest.raises(
    errors.UserError, match=f"in the format '{file_format}'.*another --config"
  ) as caught:
    cifar10_tfds.read_prepared(prepared)
  assert "delete" not in str(caught.value)


# ---- Downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A local mirror: the path of a URL selects its behavior; `server.seen` lists the requests."""
  blob = cifar10_files.write_archive(tmp_path / "served" / cifar10_archive.ARCHIVE).read_bytes()
  monkeypatch.setattr(cifar10_download, "ARCHIVE_BYTES", len(blob))
  monkeypatch.setattr(cifar10_archive, "ARCHIVE_MD5", hashlib.md5(blob).hexdigest())

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      byte_range = self.headers.get("Range")
      self.server.seen.append((self.path, byte_range))
      kind = self.path.strip("/")
      body, status = (b"x" * len(blob) if kind == "wrong" else blob), 200
      if kind == "missing":
        return self.send_error(404)
      if byte_range and kind != "stubborn":
        body, status = body[int(byte_range.removeprefix("bytes=").rstrip("-")) :], 206
      self.send_response(status)
      if kind != "page":
        self.send_header("Content-Length", "all" if kind == "vague" else str(len(body)))
      self.end_headers()
      sent = {"breaks": body[: len(body) // 2], "page": b"<html>log in</html>"}.get(kind, body)
      return self.wfile.write(sent)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
    httpd.seen, httpd.blob = [], blob
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()


def use_mirrors(monkeypatch, server, *kinds):
  urls = tuple(f"http://127.0.0.1:{server.server_port}/{kind}" for kind in kinds)
  monkeypatch.setattr(cifar10_download, "MIRRORS", urls)


def test_download_prepares_and_leaves_no_part(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "good")
  train, test, _ = cifar10.load_cifar10(dir=str(tmp_path / "new" / "dir"))
  expected = cifar10_archive.read_archive(tmp_path / "served" / cifar10_archive.ARCHIVE)
  assert (as_set(train), as_set(test)) == tuple(as_set(split) for split in expected)
  names = {path.name for path in (tmp_path / "new" / "dir").iterdir()}
  assert {cifar10_archive.ARCHIVE, "cifar10"} <= names
  assert not any(name.endswith(".part") for name in names)
  cifar10.load_cifar10(dir=str(tmp_path / "new" / "dir"))
  assert len(server.seen) == 1


def test_a_second_first_run_waits_for_the_first(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "good")
  root, printed = tmp_path / "new", queue.Queue()
  monkeypatch.setattr(cifar10, "_print", printed.put)
  splits = cifar10_archive.read_archive(tmp_path / "served" / cifar10_archive.ARCHIVE)
  with ThreadPoolExecutor(1) as pool:
    with cifar10._lock(root):
      second = pool.submit(cifar10.load_cifar10, dir=str(root))
      assert printed.get(timeout=10).startswith("Waiting for another process")
      cifar10_tfds.prepare_cifar10(train=splits[0], test=splits[1], data_dir=root)
    train, test, _ = second.result(timeout=10)
  assert (as_set(train), as_set(test)) == tuple(as_set(split) for split in splits)
  assert printed.empty()
  assert server.seen == []


def test_a_wrong_folder_is_left_as_it_was(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "missing")
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
  cifar10_files.write_archive(tmp_path / cifar10_archive.ARCHIVE)
  assert len(cifar10.load_cifar10(dir=str(tmp_path))[0]) == 20


def test_an_archive_that_cannot_be_renamed_is_one_error(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "good")
  (tmp_path / cifar10_archive.ARCHIVE / "x").mkdir(parents=True)
  with pytest.raises(errors.UserError, match=r"cannot be written .*make room or choose another"):
    cifar10_download.download_archive(tmp_path)


def test_mirrors_fail_over_in_order(tmp_path, monkeypatch, server):
  kinds = ("missing", "wrong", "page", "vague", "good")
  use_mirrors(monkeypatch, server, *kinds, "unused")
  path = cifar10_download.download_archive(tmp_path)
  assert path.read_bytes() == server.blob
  # No request resumes from wrong bytes.
  assert server.seen == [(f"/{kind}", None) for kind in kinds]


def test_the_mirror_of_the_user_comes_first(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "unused")
  monkeypatch.setenv("FLAX_CIFAR_MIRROR", f"http://127.0.0.1:{server.server_port}/own")
  cifar10_download.download_archive(tmp_path)
  assert server.seen == [("/own", None)]


def test_broken_download_is_resumed_by_the_next_mirror(tmp_path, monkeypatch, server):
  monkeypatch.setattr(cifar10_archive, "CHUNK_BYTES", 1000)  # a broken download loses at most this
  use_mirrors(monkeypatch, server, "breaks", "good")
  assert cifar10_download.download_archive(tmp_path).read_bytes() == server.blob
  kept = len(server.blob) // 2 // 1000 * 1000
  assert server.seen == [("/breaks", None), ("/good", f"bytes={kept}-")]


def test_partial_downloads_of_earlier_runs(tmp_path, monkeypatch, server):
  part = tmp_path / f"{cifar10_archive.ARCHIVE}.part"
  part.write_bytes(server.blob[:1000])
  use_mirrors(monkeypatch, server, "stubborn")  # ignores Range and answers 200 with everything
  assert cifar10_download.download_archive(tmp_path).read_bytes() == server.blob
  part.write_bytes(b"y" * 1000)  # not the beginning of the archive
  use_mirrors(monkeypatch, server, "first", "second")
  assert cifar10_download.download_archive(tmp_path).read_bytes() == server.blob
  assert server.seen[1:] == [("/first", "bytes=1000-"), ("/second", None)]
  part.write_bytes(server.blob)  # complete: no request at all
  cifar10_download.download_archive(tmp_path)
  assert len(server.seen) == 3


def test_if_all_mirrors_fail_the_error_has_reasons_and_remedies(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "missing", "wrong")
  refused = "http://127.0.0.1:9/x"
  odd = ("no-url", "http://[bad/x", "http://ü..x/y")
  monkeypatch.setattr(cifar10_download, "MIRRORS", (*cifar10_download.MIRRORS, refused, *odd))
  start = time.monotonic()
  with pytest.raises(errors.UserError) as caught:
    cifar10.load_cifar10(dir=str(tmp_path))
  assert time.monotonic() - start < 5
  text = str(caught.value)
  for part in ("HTTP 404", "wrong checksum", "127.0.0.1:9: no connection", "no-url: Invalid URL"):
    assert part in text
  for part in ("[bad: Failed to parse", "ü..x: Failed to parse"):
    assert part in text
  for remedy in (
    cifar10_archive.ARCHIVE_MD5,
    "TFDS_DATA_DIR",
    "--config.data.name=shapes",
    str(tmp_path),
  ):
    assert remedy in text
  assert "\n" not in text


def test_requests_get_times_out_and_does_not_retry(tmp_path, monkeypatch):
  calls = []

  def get(url, **kwargs):
    calls.append((url, kwargs["timeout"]))
    raise requests.ConnectTimeout

  monkeypatch.setattr(requests, "get", get)
  monkeypatch.setattr(cifar10_download, "MIRRORS", ("http://a/x", "http://b/x"))
  with pytest.raises(errors.UserError, match="a: no answer in time; b: no answer in time"):
    cifar10_download.download_archive(tmp_path)
  assert calls == [("http://a/x", (5, 30)), ("http://b/x", (5, 30))]


def test_disk_and_directory_are_checked_first(tmp_path, monkeypatch, server):
  use_mirrors(monkeypatch, server, "good")
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be made"):
    cifar10_download.download_archive(tmp_path / "file" / "x")
  with monkeypatch.context() as patch:
    patch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(errors.UserError, match="cannot be written to"):
      cifar10_download.download_archive(tmp_path)
  monkeypatch.setattr(cifar10_download, "DISK_BYTES", 1 << 62)
  with pytest.raises(errors.UserError, match="MB free but CIFAR-10 needs"):
    cifar10_download.download_archive(tmp_path)
  assert server.seen == []


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
