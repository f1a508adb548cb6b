"""Small archives of CIFAR-10 in each of its formats."""

import io
import pickle
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from tensorboardX.record_writer import RecordWriter

PER_BATCH = 4
FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def make_rows():
  """Six batches of (labels, rows of 1024 red, 1024 green, 1024 blue bytes)."""
  rng = np.random.default_rng(3)
  return [
    (rng.integers(0, 10, PER_BATCH), rng.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8))
    for _ in FILES
  ]


def pickled(labels, rows):
  labels = [int(label) for label in labels]
  return pickle.dumps({b"data": rows, b"labels": labels, b"batch_label": b"x"}, protocol=2)


def binary(labels, rows):
  return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))


FORMATS = {
  "cifar-10-python.tar.gz": ("cifar-10-batches-py/", "", pickled),
  "cifar-10-binary.tar.gz": ("cifar-10-batches-bin/", ".bin", binary),
}


def write_archive(path, replace=None):
  """Writes a tiny archive in the format of its name; `replace` overrides members."""
  folder, suffix, encode = FORMATS[path.name]
  blobs = {name + suffix: encode(*batch) for name, batch in zip(FILES, make_rows(), strict=True)}
  blobs |= {"readme.html": b"hello"} | (replace or {})
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w:gz") as tar:
    for name, blob in blobs.items():
      if blob is not None:
        member = tarfile.TarInfo(folder + name)
        member.size = len(blob)
        tar.addfile(member, io.BytesIO(blob))
  return path


def shard(folder, split="train"):
  (path,) = folder.glob(f"cifar10-{split}.*")
  return path


def to_tfrecord(folder):
  """Converts a prepared directory from array_record to tfrecord, by another library's writer."""
  data_source = tfds.builder_from_directory(folder).as_data_source(
    deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  for split, records in data_source.items():
    old = shard(folder, split)
    writer = RecordWriter(str(folder / old.name.replace("array_record", "tfrecord")))
    for record in records:
      writer.write(record)
    writer.close()
    old.unlink()
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
