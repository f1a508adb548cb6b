"""One process downloads and prepares at a time; what is there is not downloaded again."""

import contextlib

import numpy as np
import pytest

from flax_cifar import errors, files
from flax_cifar.data.sources import catalog, preparation, prepared
from tests import mirror, published_files


@pytest.fixture
def server(monkeypatch):
  """A mirror of MNIST."""
  mirror.remove_all(monkeypatch)
  blobs = published_files.encode("mnist", published_files.draw("mnist"))
  published_files.expect(monkeypatch, "mnist", blobs)
  names = [file.name for file in catalog.CATALOG["mnist"].files]
  with mirror.serve(dict(zip(names, blobs, strict=True))) as httpd:
    httpd.blobs = blobs
    mirror.use(monkeypatch, httpd, "mnist", "good")
    yield httpd


def write_files(root, blobs):
  """Puts files where those of MNIST belong."""
  folder = root / "downloads" / "mnist"
  folder.mkdir(parents=True)
  for file, blob in zip(catalog.CATALOG["mnist"].files, blobs, strict=False):
    (folder / file.name).write_bytes(blob)
  return folder


def test_files_that_are_there_are_used_and_only_the_others_downloaded(tmp_path, server):
  write_files(tmp_path, server.blobs[:3])
  data = prepared.load_prepared("mnist", dir=str(tmp_path))
  assert (len(data.train), len(data.test)) == (20, 4)
  assert server.seen == [("/good/t10k-labels-idx1-ubyte.gz", None)]


def test_a_second_start_decodes_nothing(tmp_path, server, monkeypatch):
  write_files(tmp_path, server.blobs)
  for _ in range(2):  # the first one downloads, and decodes what it has prepared
    first = prepared.load_prepared("mnist", dir=str(tmp_path))
  monkeypatch.delattr(prepared, "read_folder")
  again = prepared.load_prepared("mnist", dir=str(tmp_path))
  assert again.class_names == first.class_names
  for one, other in ((again.train, first.train), (again.test, first.test)):
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)


def test_a_file_with_another_checksum_is_refused_and_kept(tmp_path, server):
  folder = write_files(tmp_path, [server.blobs[0], b"mine"])
  file = catalog.CATALOG["mnist"].files[1]
  message = (
    rf"{file.name} is damaged or not tfds:mnist \(its sha256 is another\); delete it and run"
  )
  with pytest.raises(errors.UserError, match=f"{message}.*{file.checksum}"):
    prepared.load_prepared("mnist", dir=str(tmp_path))
  assert (folder / file.name).read_bytes() == b"mine"
  assert server.seen == []


def test_what_another_process_prepared_meanwhile_is_read(tmp_path, server, monkeypatch):
  lock, source = preparation.lock, catalog.CATALOG["mnist"]

  @contextlib.contextmanager
  def wait(source, root):
    with lock(source, root):
      preparation.prepare(source, preparation.read_published(source, root), root)
    with lock(source, root):
      yield

  monkeypatch.setattr(preparation, "lock", wait)
  assert len(prepared.load_prepared("mnist", dir=str(tmp_path)).train) == 20
  assert len(server.seen) == len(source.files)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
  """The process that held it before removes it where it leaves nothing."""
  lock, path = files.lock, tmp_path / "mnist.lock"
  taken = []

  def remove_and_lock(file, *, wait):
    if not taken:
      path.unlink()
    taken.append(file)
    return lock(file, wait=wait)

  monkeypatch.setattr(preparation.files, "lock", remove_and_lock)
  with preparation.lock(catalog.CATALOG["mnist"], tmp_path):
    assert len(taken) == 2
    with path.open("a") as file:
      assert not lock(file, wait=False)


def test_the_file_of_a_lock_is_removed_while_it_is_held(tmp_path, monkeypatch):
  """Else a process that waited for it and one that comes later would both have a lock."""
  held, remove = [], preparation._remove_empty

  def watch(path, created):
    with path.open("a") as file:
      held.append(not files.lock(file, wait=False))
    remove(path, created)

  monkeypatch.setattr(preparation, "_remove_empty", watch)
  with preparation.lock(catalog.CATALOG["mnist"], tmp_path):
    pass
  assert held == [True]
  assert list(tmp_path.iterdir()) == []


def test_an_interrupted_preparation_leaves_nothing_that_looks_prepared(
  tmp_path, server, monkeypatch
):
  def fail(image):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("flax_cifar.data.sources.tfds_writer._png", fail)
    with pytest.raises(errors.UserError, match=r"cannot be prepared .*No space left.*make room"):
      prepared.load_prepared("mnist", dir=str(tmp_path))
  assert prepared.find_newest(tmp_path / "mnist") is None
  assert len(prepared.load_prepared("mnist", dir=str(tmp_path)).train) == 20
  assert len(server.seen) == 4  # the files stay
