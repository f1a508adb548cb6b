"""Downloads: mirrors, resumption, checksums, room and the errors, with tiny files."""

import dataclasses
import os
import shutil
import time

import pytest
import requests

from flax_cifar import errors
from flax_cifar.data.sources import catalog, cifar10, cifar_archive, download
from tests import cifar10_files, mirror


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """CIFAR-10 with four images per batch, and without mirrors."""
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", cifar10_files.PER_BATCH)
  mirror.remove_all(monkeypatch)
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def server(tmp_path, monkeypatch):
  blob = cifar10_files.write_archive(tmp_path / "served" / cifar_archive.ARCHIVE).read_bytes()
  mirror.expect(monkeypatch, "cifar10", 0, blob)
  with mirror.serve({"": blob}) as httpd:
    httpd.blob = blob
    yield httpd


def download_archive(root):
  source = catalog.CATALOG["cifar10"]
  return download.download_file(source, source.files[0], root)


def test_an_archive_that_cannot_be_renamed_is_one_error(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "good")
  (tmp_path / cifar_archive.ARCHIVE / "x").mkdir(parents=True)
  with pytest.raises(errors.UserError, match=r"cannot be written .*make room or choose another"):
    download_archive(tmp_path)


def test_mirrors_fail_over_in_order(tmp_path, monkeypatch, server):
  kinds = ("missing", "wrong", "page", "vague", "good")
  mirror.use(monkeypatch, server, "cifar10", *kinds, "unused")
  path = download_archive(tmp_path)
  assert path.read_bytes() == server.blob
  # No request resumes from wrong bytes.
  assert server.seen == [(f"/{kind}", None) for kind in kinds]


def test_the_mirror_of_the_user_comes_first(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "unused")
  monkeypatch.setenv("FLAX_CIFAR_MIRROR", f"http://127.0.0.1:{server.server_port}/own")
  download_archive(tmp_path)
  assert server.seen == [("/own", None)]


def test_broken_download_is_resumed_by_the_next_mirror(tmp_path, monkeypatch, server):
  monkeypatch.setattr(download, "CHUNK_BYTES", 1000)  # a broken download loses at most this
  mirror.use(monkeypatch, server, "cifar10", "breaks", "good")
  assert download_archive(tmp_path).read_bytes() == server.blob
  kept = len(server.blob) // 2 // 1000 * 1000
  assert server.seen == [("/breaks", None), ("/good", f"bytes={kept}-")]


def test_partial_downloads_of_earlier_runs(tmp_path, monkeypatch, server):
  part = tmp_path / f"{cifar_archive.ARCHIVE}.part"
  part.write_bytes(server.blob[:1000])
  # It ignores Range and answers 200 with everything.
  mirror.use(monkeypatch, server, "cifar10", "stubborn")
  assert download_archive(tmp_path).read_bytes() == server.blob
  part.write_bytes(b"y" * 1000)  # not the beginning of the archive
  mirror.use(monkeypatch, server, "cifar10", "first", "second")
  assert download_archive(tmp_path).read_bytes() == server.blob
  assert server.seen[1:] == [("/first", "bytes=1000-"), ("/second", None)]
  part.write_bytes(server.blob)  # complete: no request at all
  download_archive(tmp_path)
  assert len(server.seen) == 3


def test_if_all_mirrors_fail_the_error_has_reasons_and_remedies(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "missing", "wrong")
  refused = "http://alice:secret@127.0.0.1:9/x"
  odd = ("no-url", "http://me:secret@[bad/x", "http://ü..x/y", "ftp://me:secret@127.0.0.1/x")
  urls = (*catalog.CATALOG["cifar10"].files[0].urls, refused, *odd)
  mirror.change_file(monkeypatch, "cifar10", 0, urls=urls)
  start = time.monotonic()
  with pytest.raises(errors.UserError) as caught:
    cifar10.load_cifar10(dir=str(tmp_path))
  assert time.monotonic() - start < 5
  text = str(caught.value)
  assert "secret" not in text
  for part in ("HTTP 404", "wrong checksum", "127.0.0.1:9: no connection"):
    assert part in text
  for part in ("no-url", "[bad", "ü..x", "127.0.0.1"):
    assert f"{part}: invalid URL" in text
  for remedy in (
    f"put {cifar_archive.ARCHIVE} (md5 {catalog.CATALOG['cifar10'].files[0].checksum}) in",
    "prepared cifar10/3.0.2",
    "TFDS_DATA_DIR",
    "data.name=shapes",
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
  mirror.change_file(monkeypatch, "cifar10", 0, urls=("http://a/x", "http://b/x"))
  with pytest.raises(errors.UserError, match="a: no answer in time; b: no answer in time"):
    download_archive(tmp_path)
  assert calls == [("http://a/x", (5, 30)), ("http://b/x", (5, 30))]


def test_disk_and_directory_are_checked_first(tmp_path, monkeypatch, server):
  mirror.use(monkeypatch, server, "cifar10", "good")
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot be made"):
    download_archive(tmp_path / "file" / "x")
  with monkeypatch.context() as patch:
    patch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(errors.UserError, match="cannot be written to"):
      download_archive(tmp_path)
  large = dataclasses.replace(catalog.CATALOG["cifar10"], disk_bytes=1 << 62)
  monkeypatch.setitem(catalog.CATALOG, "cifar10", large)
  with pytest.raises(errors.UserError, match="MB free but CIFAR-10 needs"):
    download_archive(tmp_path)
  assert server.seen == []


def test_what_has_arrived_needs_no_more_room(tmp_path, monkeypatch):
  source = dataclasses.replace(catalog.CATALOG["cifar10"], disk_bytes=10_000)
  (part,) = (tmp_path / source.place / f"{file.name}.part" for file in source.files)
  part.parent.mkdir(exist_ok=True)
  part.write_bytes(bytes(100))
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9_899))
  with pytest.raises(errors.UserError, match="MB free but CIFAR-10 needs"):
    download._check_room(source, tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9_900))
  download._check_room(source, tmp_path)
