"""Every loader turns damaged or hostile data into a valid data set or one clear error."""

import builtins
import gzip
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flax_cifar import errors
from flax_cifar.data import load
from flax_cifar.data.sources import catalog, cifar10, cifar_archive, tfds_writer
from tests import cifar10_files, fuzz, mirror

SIZE = 8
seeds = st.randoms(use_true_random=False)


def one_line(error, culprit=""):
  text = str(error)
  assert culprit in text
  assert "\n" not in text
  return text


def load_or_refuse(name, size=SIZE):
  """Checks that the data set is valid and returns None, or returns the one-line error."""
  try:
    data = load.load_dataset(name=name, dir="", image_size=size)
  except errors.UserError as error:
    return one_line(error)
  assert all(name.isprintable() for name in data.class_names)
  for split in (data.train, data.test):
    assert split.images.dtype == np.uint8
    assert split.images.shape == (len(split.labels), size, size, 3)
    assert split.labels.dtype == np.int32
    assert len(split) > 0
    assert 0 <= split.labels.min() <= split.labels.max() < len(data.class_names)
  return None


# ---- npz


def make_arrays(count=6):
  rng = np.random.default_rng(count)
  images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
  labels = np.arange(count) % 3
  return {
    "train_images": images,
    "train_labels": labels,
    "test_images": images,
    "test_labels": labels,
    "class_names": np.array(["a", "b", "c"]),
  }


def save(arrays, save=np.savez):
  file = io.BytesIO()
  save(file, **arrays)
  return file.getvalue()


ARRAYS = make_arrays()
PLAIN = save(ARRAYS)
PACKED = save(ARRAYS, np.savez_compressed)


@fuzz.fuzz(100)
@given(blob=fuzz.damaged(PLAIN) | fuzz.damaged(PACKED))
def test_damaged_npz(tmp_path_factory, blob):
  path = tmp_path_factory.getbasetemp() / "a.npz"
  path.write_bytes(blob)
  load_or_refuse(f"npz:{path}")


def damage_member(rng):
  """A valid zip file in which one array is damaged or is not an array."""
  file, wanted = io.BytesIO(), rng.choice([f"{key}.npy" for key in ARRAYS])
  with zipfile.ZipFile(io.BytesIO(PLAIN)) as old, zipfile.ZipFile(file, "w") as new:
    for name in old.namelist():
      blob = old.read(name)
      if name == wanted:
        head, body = blob[:128], blob[128:]
        others = (
          fuzz.damage(blob, rng),
          fuzz.damage(head, rng) + body,
          head + body[:9],
          b"no array",
          b"",
        )
        blob = rng.choice(others)
      new.writestr(name, blob)
  return file.getvalue()


@fuzz.fuzz(80)
@given(blob=seeds.map(damage_member))
def test_npz_with_a_damaged_member(tmp_path_factory, blob):
  path = tmp_path_factory.getbasetemp() / "a.npz"
  path.write_bytes(blob)
  load_or_refuse(f"npz:{path}")


ODD = (
  np.zeros((6, SIZE, SIZE, 3), np.uint8),
  np.full((6, SIZE, SIZE, 3), np.nan),
  np.full((6, SIZE, SIZE, 3), np.inf, np.float16),
  np.zeros((6, SIZE, SIZE), np.uint8),
  np.zeros((6, 3, SIZE, SIZE), np.uint8),
  np.zeros((0, SIZE, SIZE, 3), np.uint8),
  np.zeros((6, 0, 0, 3), np.uint8),
  np.zeros((6, SIZE, SIZE, 3), np.int8),
  np.uint8(3),
  np.zeros(()),
  np.zeros(6, bool),
  np.zeros(6, complex),
  np.zeros(6, "datetime64[s]"),
  np.zeros(6, [("x", np.int32)]),
  np.zeros(6, object),
  np.array(["a", "b"]),
  np.array([b"\xff", b"\0"]),
  np.array([], str),
  np.array(["x"] * 20_000),
  np.array(3),
  np.arange(6)[:, None],
  np.arange(6, dtype=">u2") % 3,
  np.zeros((6, 3), int),
  np.full(6, -1),
  np.full(6, 10**9),
  np.full(6, 2**64 - 1, np.uint64),
  np.zeros(6, int),
)


@fuzz.fuzz(60)
@given(odd=st.dictionaries(st.sampled_from(list(ARRAYS)), st.sampled_from(ODD) | st.none()))
def test_npz_of_odd_arrays(tmp_path_factory, odd):
  path = tmp_path_factory.getbasetemp() / "a.npz"
  arrays = {key: value for key, value in (ARRAYS | odd).items() if value is not None}
  path.write_bytes(save(arrays))
  load_or_refuse(f"npz:{path}")


@pytest.mark.parametrize("name", ["\udcff", "a\n", "\x1b[0m"])
def test_unprintable_class_names_are_refused(tmp_path, name):
  path = tmp_path / "a.npz"
  path.write_bytes(save(ARRAYS | {"class_names": np.array(["a", "b", name])}))
  assert repr(name) in load_or_refuse(f"npz:{path}")


def test_npz_that_exceeds_the_memory_is_refused_unread(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  path.write_bytes(PLAIN)
  monkeypatch.setattr(os, "sysconf", lambda name: 10)
  assert "more than the" in load_or_refuse(f"npz:{path}")


@pytest.mark.parametrize("count", [10**12, 2**62, 10**30])
def test_npz_whose_header_claims_too_much(tmp_path, count):
  head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 8, 8, 3), }}".encode()
  blob = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(64)
  path = tmp_path / "a.npz"
  path.write_bytes(PLAIN)
  with zipfile.ZipFile(path, "w") as file:
    for key in ARRAYS:
      file.writestr(f"{key}.npy", blob)
  assert "cannot be read" in load_or_refuse(f"npz:{path}")


# ---- Folders of images


def encode(format, **options):
  file = io.BytesIO()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(file, format, **options)
  return file.getvalue()


IMAGES = {
  suffix: encode(*format)
  for suffix, format in {
    "png": ("PNG",),
    "jpg": ("JPEG",),
    "gif": ("GIF",),
    "bmp": ("BMP",),
    "webp": ("WEBP",),
  }.items()
}


def write_folder(path):
  for name in ("a", "b"):
    (path / name).mkdir(parents=True, exist_ok=True)
    for number in range(2):
      (path / name / f"{number}.png").write_bytes(IMAGES["png"])
  return path


@fuzz.fuzz(120)
@given(suffix=st.sampled_from(sorted(IMAGES)), other=st.sampled_from(sorted(IMAGES)), rng=seeds)
def test_damaged_images(tmp_path_factory, suffix, other, rng):
  """Includes images whose format differs from their suffix."""
  folder = write_folder(tmp_path_factory.getbasetemp() / "images")
  path = folder / "a" / f"x.{suffix}"
  path.write_bytes(fuzz.damage(IMAGES[other], rng))
  message = load_or_refuse(f"folder:{folder}")
  path.unlink()
  assert message is None or path.name in message


def make_pipe(path):
  os.mkfifo(path)


ODD_FILES = {
  "text": lambda path: path.write_text("no picture"),
  "empty": lambda path: path.write_bytes(b""),
  "pipe": make_pipe,
  "loop": lambda path: path.symlink_to(path),
  "dangling": lambda path: path.symlink_to("nowhere"),
  "device": lambda path: path.symlink_to("/dev/zero"),
  "bomb": lambda path: path.write_bytes(write_bomb()),
}


def write_bomb():
  """An image of four gigapixels in a hundred bytes."""
  head = b"BM" + (100).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
  info = (
    (40).to_bytes(4, "little") + (1 << 16).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
  )
  return head + info


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_file_that_is_not_an_image_is_named(tmp_path, kind):
  write_folder(tmp_path)
  ODD_FILES[kind](tmp_path / "a" / "x.png")
  message = load_or_refuse(f"folder:{tmp_path}")
  assert "images cannot be read" in message
  assert "a/x.png (" in message


@pytest.mark.parametrize("kind", ["loop", "dangling", "pipe", "text"])
def test_an_entry_that_is_not_a_folder_is_no_class(tmp_path, kind):
  write_folder(tmp_path)
  ODD_FILES[kind](tmp_path / "c")
  assert load_or_refuse(f"folder:{tmp_path}") is None


def test_missing_permissions_are_reported(tmp_path, monkeypatch):
  """Replaces `open`, because root may read everything."""
  write_folder(tmp_path)
  (tmp_path / "a.npz").write_bytes(PLAIN)
  real, scan = builtins.open, os.scandir

  def refuse(path, *args, **options):
    if os.fspath(path).startswith(str(tmp_path)):
      raise PermissionError(13, "Permission denied", str(path))
    return real(path, *args, **options)

  monkeypatch.setattr(builtins, "open", refuse)
  monkeypatch.setattr(io, "open", refuse)
  assert "Permission denied" in load_or_refuse(f"npz:{tmp_path / 'a.npz'}")
  assert "Permission denied" in load_or_refuse(f"folder:{tmp_path}")
  monkeypatch.setattr(os, "listdir", refuse)
  monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scan(path))
  assert "Permission denied" in load_or_refuse(f"folder:{tmp_path}")


# ---- CIFAR-10: archives

BATCH_FILES = {
  name: write(*cifar10_files.make_rows()[0])
  for name, (_, _, write) in cifar10_files.FORMATS.items()
}


@pytest.fixture(autouse=True)
def tiny_cifar10(monkeypatch):
  """CIFAR-10 with four images in each file, and without mirrors."""
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", cifar10_files.PER_BATCH)
  mirror.remove_all(monkeypatch)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
  """The bytes of an archive in each format."""
  folder = tmp_path_factory.mktemp("archives")
  paths = [cifar10_files.write_archive(folder / name) for name in cifar10_files.FORMATS]
  return {path.name: path.read_bytes() for path in paths}


def read_or_refuse(path):
  """Checks the splits of `read_archive` and returns None, or returns the one-line error."""
  try:
    splits = cifar_archive.read_archive(path)
  except errors.UserError as error:
    return one_line(error, path.name)
  for split, count in zip(splits, (20, 4), strict=True):
    assert split.images.shape == (count, 32, 32, 3)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    assert set(split.labels.tolist()) <= set(range(len(cifar_archive.CLASS_NAMES)))
  return None


@fuzz.fuzz(60)
@given(name=st.sampled_from(sorted(cifar10_files.FORMATS)), rng=seeds, inside=st.booleans())
def test_damaged_archive(tmp_path_factory, archives, name, rng, inside):
  """Damages the compressed file, or the tar file and compresses it again."""
  path = tmp_path_factory.getbasetemp() / name
  blob = archives[name]
  if inside:
    tar = gzip.decompress(blob)
    start = 512 * rng.randrange(len(tar) // 512) if rng.random() < 0.5 else 0
    head = tar[start : start + 512]  # often the header of a member
    path.write_bytes(gzip.compress(tar[:start] + fuzz.damage(head, rng) + tar[start + 512 :], 1))
  else:
    path.write_bytes(fuzz.damage(blob, rng))
  read_or_refuse(path)


@fuzz.fuzz(150)
@given(name=st.sampled_from(sorted(cifar10_files.FORMATS)), rng=seeds)
def test_damaged_batch_file(tmp_path_factory, name, rng):
  """Damages a file of an unpacked folder, which has no checksums."""
  inside, suffix, _ = cifar10_files.FORMATS[name]
  folder = tmp_path_factory.getbasetemp() / inside.rstrip("/")
  folder.mkdir(exist_ok=True)
  blob = BATCH_FILES[name]
  for file in cifar10_files.FILES:
    (folder / f"{file}{suffix}").write_bytes(blob)
  cut = rng.choice((len(blob), 200))  # the head of a pickle matters more than its pixels
  ends = (blob[:cut], blob[-cut:])
  damaged_blob = rng.choice(
    (fuzz.damage(ends[0], rng) + blob[cut:], blob[:-cut] + fuzz.damage(ends[1], rng))
  )
  (folder / f"{rng.choice(cifar10_files.FILES)}{suffix}").write_bytes(damaged_blob)
  read_or_refuse(folder)


class Call:
  """Unpickles by calling a function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  "thing",
  [
    Call(os.system, "touch evil"),
    Call(eval, "open('evil', 'w')"),
    Call(getattr, "os", "system"),
    Call(np.load, "evil", None, True),
    Call(np.fromfile, "/dev/zero"),
    Call(np.ndarray, (1 << 60,)),
    {b"data": Call(np.zeros, (1 << 40,)), b"labels": []},
  ],
)
def test_a_pickle_calls_nothing(tmp_path, monkeypatch, thing):
  monkeypatch.chdir(tmp_path)
  path = cifar10_files.write_archive(
    tmp_path / "in" / cifar_archive.ARCHIVE, {"data_batch_3": pickle.dumps(thing, protocol=2)}
  )
  assert read_or_refuse(path) is not None
  assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", sorted(cifar10_files.FORMATS))
def test_an_archive_writes_nothing_beside_it(tmp_path, monkeypatch, name):
  """Its members lead elsewhere, by their names or as links; some replace a batch."""
  monkeypatch.chdir(tmp_path)
  path = cifar10_files.write_archive(tmp_path / "in" / name)
  plain = tmp_path / "in" / "plain.tar"
  plain.write_bytes(gzip.decompress(path.read_bytes()))
  inside, suffix, _ = cifar10_files.FORMATS[name]
  with tarfile.open(plain, "a") as tar:
    for member in ("../evil", "../../evil", str(tmp_path / "evil"), f"{inside}../../evil"):
      info = tarfile.TarInfo(member)
      info.size = 4
      tar.addfile(info, io.BytesIO(b"evil"))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
      info = tarfile.TarInfo(f"{inside}data_batch_1{suffix}")
      info.type, info.linkname = kind, "/etc/passwd"
      tar.addfile(info)
  path.write_bytes(gzip.compress(plain.read_bytes()))
  plain.unlink()
  read_or_refuse(path)
  assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
  assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
  path = cifar10_files.write_archive(tmp_path / cifar_archive.ARCHIVE)
  monkeypatch.setattr(cifar_archive, "MAX_UNPACKED_BYTES", 50_000)
  assert "claims" in read_or_refuse(path)
  monkeypatch.setattr(cifar_archive, "MAX_UNPACKED_BYTES", 110_000)  # the padding at the end
  with tarfile.open(path) as tar:
    used = max(member.offset_data + member.size for member in tar)
  monkeypatch.setattr(cifar_archive, "MAX_UNPACKED_BYTES", used)
  monkeypatch.setattr(cifar_archive, "CHUNK_BYTES", 1)
  assert "more than" in read_or_refuse(path)


# ---- CIFAR-10: prepared directories


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A prepared directory in each format, as the bytes of its files."""
  folder = tmp_path_factory.mktemp("prepared")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cifar_archive, "BATCH_SIZE", cifar10_files.PER_BATCH)
    path = cifar10_files.write_archive(folder / cifar_archive.ARCHIVE)
    splits = cifar_archive.read_archive(path)
  made = tfds_writer.prepare(catalog.CATALOG["cifar10"], splits, data_dir=folder)
  forms = [{path.name: path.read_bytes() for path in made.iterdir()}]
  cifar10_files.to_tfrecord(made)
  return (*forms, {path.name: path.read_bytes() for path in made.iterdir()})


@fuzz.fuzz(60)
@given(rng=seeds)
def test_damaged_prepared_directory(tmp_path_factory, prepared, rng):
  """Damages any of its files, in either format; the reader of array_record is native code."""
  files = dict(rng.choice(prepared))
  name = rng.choice(sorted(files))
  blob = files[name]
  used = len(blob.rstrip(b"\0"))  # an array_record is padded with zeros
  files[name] = fuzz.damage(blob[:used], rng) + blob[used:]
  folder = tmp_path_factory.getbasetemp() / "tfds" / "cifar10" / "3.0.2"
  folder.mkdir(parents=True, exist_ok=True)
  for path in folder.iterdir():
    path.unlink()
  for file, content in files.items():
    (folder / file).write_bytes(content)
  try:
    train, test = cifar10.read_prepared(folder)
  except errors.UserError as error:
    one_line(error, str(folder))
  else:
    assert (len(train), len(test)) == (20, 4)
    assert set(np.concatenate([train.labels, test.labels]).tolist()) <= set(range(10))


@pytest.mark.parametrize("dir", ["~nobody-here", "x" * 5000, "\0", "/dev/null", "/dev/null/x"])
def test_an_impossible_directory_is_quoted(dir):
  with pytest.raises(errors.UserError) as caught:
    cifar10.load_cifar10(dir=dir)
  assert dir in str(caught.value) or repr(dir) in str(caught.value)
