"""The data sets of the catalog: the facts of TFDS, and each one downloaded, prepared and read."""

import csv
import importlib.resources
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_cifar import errors
from flax_cifar.data import load
from flax_cifar.data.sources import catalog, cifar_archive
from tests import mirror, published_files


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """CIFAR with four test images, and no mirrors."""
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", published_files.COUNTS["test"])
  mirror.remove_all(monkeypatch)


def read_checksums(name):
  """The (size, checksum) that TFDS has for each URL."""
  package = importlib.resources.files(tfds)
  places = (f"url_checksums/{name}.txt", f"datasets/{name}/checksums.tsv")
  (path,) = (path for path in map(package.joinpath, places) if path.is_file())
  rows = csv.reader(path.read_text().splitlines(), delimiter="\t")
  return {url: (int(size), checksum) for url, size, checksum, *_ in rows}


@pytest.mark.parametrize("source", [*catalog.CATALOG.values()][1:], ids=lambda source: source.name)
def test_urls_sizes_and_checksums_are_those_of_tfds(source):
  known = read_checksums(source.name)
  for file in source.files:
    assert file.algorithm == "sha256"
    assert [known[url] for url in file.urls] == [(file.size, file.checksum)]
    assert file.urls[0].endswith(f"/{file.name}")


@pytest.mark.parametrize("source", catalog.CATALOG.values(), ids=lambda source: source.name)
def test_version_size_ids_and_names_fit_the_builder_of_tfds(source, tmp_path):
  info = tfds.builder(source.name, data_dir=tmp_path).info
  assert str(info.version) == source.version
  assert info.features["image"].shape[:2] == (source.image_size,) * 2
  assert ("id" in info.features) == (source.id_digits > 0)
  for feature, names in source.names.items():
    assert info.features[feature].num_classes == len(names) == len(set(names))


@pytest.fixture(params=list(catalog.CATALOG))
def served(request, monkeypatch):
  """The name of a data set whose files a local server has, the arrays in them, and the server."""
  name = request.param
  parts = published_files.draw(name)
  blobs = published_files.encode(name, parts)
  published_files.expect(monkeypatch, name, blobs)
  files = catalog.CATALOG[name].files
  names = [file.name for file in files] if len(files) > 1 else [""]
  with mirror.serve(dict(zip(names, blobs, strict=True))) as server:
    mirror.use(monkeypatch, server, name, "good")
    yield name, parts, server


def load_it(name, root):
  size = catalog.CATALOG[name].image_size
  return load.load_dataset(name=f"tfds:{name}", dir=str(root), image_size=size)


def assert_same(name, part, arrays, ours, theirs):
  """Compares a split with the arrays in the files, and with what TFDS reads."""
  digits = catalog.CATALOG[name].id_digits
  numbers = {image.tobytes(): i for i, image in enumerate(arrays["image"])}
  assert len(ours) == len(theirs) == len(numbers) == published_files.COUNTS[part]
  for image, label, example in zip(ours.images, ours.labels, theirs, strict=True):
    i = numbers.pop(example["image"].tobytes())
    np.testing.assert_array_equal(image, np.broadcast_to(arrays["image"][i], image.shape))
    assert label == example["label"] == arrays["label"][i]
    assert example.get("id", b"").decode() == (f"{part}_{i:0{digits}d}" if digits else "")
    if name == "cifar100":
      assert example["coarse_label"] == arrays["coarse_label"][i]


def test_what_is_downloaded_is_prepared_and_read_by_us_and_by_tfds(served, tmp_path, capsys):
  name, parts, server = served
  data = load_it(name, tmp_path)
  assert f"Preparing {catalog.CATALOG[name].title} in {tmp_path / name}," in capsys.readouterr().err
  theirs = tfds.data_source(name, data_dir=tmp_path, download=False)
  for part, arrays in parts.items():
    assert_same(name, part, arrays, getattr(data, part), theirs[part])
  assert len(list((tmp_path / name).iterdir())) == 1  # nothing incomplete is left
  again = load_it(name, tmp_path)
  np.testing.assert_array_equal(again.train.images, data.train.images)
  assert capsys.readouterr().err == ""
  assert len(server.seen) == len(catalog.CATALOG[name].files)


NAMES = {
  "cifar10": cifar_archive.CLASS_NAMES,
  "cifar100": cifar_archive.FINE_NAMES,
  "mnist": tuple("0123456789"),
  "fashion_mnist": (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
  ),
  "svhn_cropped": tuple("0123456789"),
}


def test_classes_have_the_names_of_tfds(served, tmp_path):
  name, _, _ = served
  assert load_it(name, tmp_path).class_names == NAMES[name]
  info = tfds.builder(name, data_dir=tmp_path).info
  assert tuple(info.features["label"].names) == NAMES[name]
  for names in catalog.CATALOG["cifar100"].names.values():
    assert list(names) == sorted(names)  # as in the files of its authors


def test_what_is_damaged_can_be_deleted_and_is_prepared_anew(served, tmp_path):
  name, _, _ = served
  first = load_it(name, tmp_path)
  (file,) = tmp_path.glob(f"{name}/*/*-test*")
  file.write_bytes(file.read_bytes()[:-40])
  remedy = rf"delete the directory {file.parent} and run again\."
  with pytest.raises(errors.UserError, match=remedy):
    load_it(name, tmp_path)
  shutil.rmtree(file.parent)
  np.testing.assert_array_equal(load_it(name, tmp_path).test.images, first.test.images)


def test_without_a_network_the_error_names_every_missing_file(served, tmp_path, monkeypatch):
  name, _, server = served
  mirror.use(monkeypatch, server, name, "missing")
  source = catalog.CATALOG[name]
  root = tmp_path / "typo" / "deep"
  with pytest.raises(errors.UserError, match=r"could not be downloaded.*HTTP 404") as caught:
    load_it(name, root)
  text = str(caught.value)
  for file in source.files:
    assert f"{file.name} ({file.algorithm} {file.checksum})" in text
  assert text.startswith(source.title)
  assert f"in {root / source.place};" in text
  assert f"prepared {name}/{source.version};" in text
  assert "\n" not in text
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error(served, tmp_path):
  name, _, _ = served
  (tmp_path / "file").touch()
  with pytest.raises(errors.UserError, match=r"cannot be made .*choose another data\.dir"):
    load_it(name, tmp_path / "file" / "below")
  (tmp_path / name).touch()  # where the prepared folder should be
  with pytest.raises(errors.UserError, match=f"data.name='tfds:{name}' cannot be prepared in"):
    load_it(name, tmp_path)


def test_a_download_with_a_wrong_checksum_is_refused(served, tmp_path, monkeypatch):
  name, _, server = served
  mirror.use(monkeypatch, server, name, "wrong")
  with pytest.raises(errors.UserError, match="wrong checksum or size"):
    load_it(name, tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_another_image_size_is_refused_before_the_download(served, tmp_path):
  name, _, server = served
  with pytest.raises(errors.UserError, match=rf"image_size=64 .*must be (28|32) for {name}"):
    load.load_dataset(name=f"tfds:{name}", dir=str(tmp_path), image_size=64)
  assert server.seen == []
