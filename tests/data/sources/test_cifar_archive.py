"""Archives of CIFAR-100 in each form; test_cifar10.py has those of CIFAR-10."""

import pickle
import tarfile

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data.sources import catalog, cifar_archive, prepared
from tests import mirror, published_files


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", published_files.COUNTS["test"])
  mirror.remove_all(monkeypatch)


def pickled(part):
  content = {
    b"data": part["image"].transpose(0, 3, 1, 2).reshape(-1, 3072),
    b"fine_labels": part["label"].tolist(),
    b"coarse_labels": part["coarse_label"].tolist(),
  }
  return pickle.dumps(content, protocol=2)


FORMS = {
  "cifar-100-binary": (".bin", published_files.encode_cifar100),
  "cifar-100-python": ("", pickled),
}


def write(folder, form, replace):
  """Writes an archive; `replace` overrides members."""
  suffix, encode = FORMS[form]
  parts = published_files.draw("cifar100")
  members = {f"{form}/{part}{suffix}": encode(arrays) for part, arrays in parts.items()}
  path = folder / f"{form}.tar.gz"
  path.write_bytes(published_files.encode_tar(members | replace))
  return path


@pytest.mark.parametrize("form", FORMS)
def test_archive_and_unpacked_folder(tmp_path, form):
  path = write(tmp_path, form, {})
  with tarfile.open(path) as tar:
    tar.extractall(tmp_path, filter="data")
  for place in (path, tmp_path / form):
    splits = cifar_archive.read_archive(place)
    for split, arrays in zip(splits, published_files.draw("cifar100").values(), strict=True):
      np.testing.assert_array_equal(split.images, arrays["image"])
      np.testing.assert_array_equal(split.labels, arrays["label"])
      np.testing.assert_array_equal(split.coarse_labels, arrays["coarse_label"])


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_beside_the_prepared_data_sets_is_used(tmp_path, form):
  write(tmp_path, form, {})
  data = prepared.load_prepared("cifar100", dir=str(tmp_path))
  assert (len(data.train), len(data.test)) == (20, 4)


@pytest.mark.parametrize(
  ("member", "blob", "message"),
  [
    ("train.bin", b"", r"train\.bin holds arrays \(0, 3072\).*, not 20 images"),
    ("train.bin", bytes(3074 * 4), r"train\.bin holds arrays \(4, 3072\) and \(4,\), not 20 im"),
    ("test.bin", bytes([0, 100, *bytes(3072)]) * 4, r"labels 100\.\.100, not 0\.\.99"),
    ("test.bin", bytes([20, 0, *bytes(3072)]) * 4, r"labels 20\.\.20, not 0\.\.19"),
  ],
)
def test_a_damaged_archive_names_the_good_one(tmp_path, member, blob, message):
  path = write(tmp_path, "cifar-100-binary", {f"cifar-100-binary/{member}": blob})
  checksum = catalog.CATALOG["cifar100"].files[0].checksum
  remedy = rf"delete it and run again .*\(sha256 of {path.name}: {checksum}\)"
  with pytest.raises(errors.UserError, match=f"{path} is damaged .*{message}.*{remedy}"):
    cifar_archive.read_archive(path)
