"""Small files of the data sets in the catalog, in the formats of their authors, from arrays."""

import gzip
import io
import tarfile

import numpy as np
import scipy.io

from tests import cifar10_files, mirror

COUNTS = {"train": 20, "test": 4}  # five times as many for training: cifar_archive.TRAIN_BATCHES


def draw(name):
  """Images uint8 (N, H, W, C) and labels (N,) of each split; of CIFAR-100 coarse labels, too."""
  rng = np.random.default_rng(5)
  shape = (28, 28, 1) if "mnist" in name else (32, 32, 3)
  classes = 100 if name == "cifar100" else 10
  return {
    part: {
      "image": rng.integers(0, 256, (count, *shape), np.uint8),
      "label": np.r_[0, classes - 1, rng.integers(0, classes, count - 2)],
      "coarse_label": rng.integers(0, 20, count),
    }
    for part, count in COUNTS.items()
  }


def encode_idx(array):
  sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
  return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def encode_mat(images, labels):
  """As SVHN has it: the images along the last axis, and 10 for the digit 0."""
  stream = io.BytesIO()
  arrays = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels, labels, 10)[:, None]}
  scipy.io.savemat(
    stream, {name: array.astype(np.uint8) for name, array in arrays.items()}, do_compression=True
  )
  return stream.getvalue()


def encode_cifar100(part):
  """Rows of coarse label, label, 1024 red, 1024 green and 1024 blue bytes."""
  planes = part["image"].transpose(0, 3, 1, 2).reshape(-1, 3072)
  rows = np.column_stack([part["coarse_label"], part["label"], planes])
  return rows.astype(np.uint8).tobytes()


def encode_tar(members):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w:gz") as tar:
    for name, blob in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(blob)
      tar.addfile(member, io.BytesIO(blob))
  return stream.getvalue()


def encode(name, parts):
  """The files of the data set `name`, in the order of the catalog."""
  if name == "cifar10":
    batches = [
      cifar10_files.pickled(labels, images.transpose(0, 3, 1, 2).reshape(-1, 3072))
      for part in parts.values()
      for images, labels in zip(
        np.split(part["image"], len(part["image"]) // 4),
        np.split(part["label"], len(part["label"]) // 4),
        strict=True,
      )
    ]
    names = [f"cifar-10-batches-py/{file}" for file in cifar10_files.FILES]
    return [encode_tar(dict(zip(names, batches, strict=True)))]
  if name == "cifar100":
    return [encode_tar({f"cifar-100-binary/{k}.bin": encode_cifar100(v) for k, v in parts.items()})]
  if name == "svhn_cropped":
    return [encode_mat(part["image"], part["label"]) for part in parts.values()]
  arrays = ((part["image"][..., 0], part["label"]) for part in parts.values())
  return [encode_idx(array) for pair in arrays for array in pair]


def expect(monkeypatch, name, blobs):
  """Lets the catalog have the sizes and checksums of `blobs`."""
  for number, blob in enumerate(blobs):
    mirror.expect(monkeypatch, name, number, blob)
