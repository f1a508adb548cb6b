"""Names to arrays: npz, folder, shapes, the validation split and the channel statistics."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_cifar.data import cifar10, source
from flax_cifar.data.dataset import Split, check_split
from flax_cifar.errors import UserError

PREPARED = Path(os.environ.get("TFDS_DATA_DIR", "")) / "cifar10"


def load(name, image_size=8):
  return source.load_dataset(name=name, dir="", image_size=image_size)


def arrays(n=6, size=8, classes=3):
  rng = np.random.default_rng(n)
  images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
  return images, np.arange(n) % classes


def write_npz(path, keys=source.NPZ_KEYS[0], **extra):
  values = (*arrays(9), *arrays(6))
  np.savez(path, **(dict(zip(keys, values, strict=True)) | extra))
  return values


@pytest.mark.parametrize("keys", source.NPZ_KEYS)
def test_npz_keeps_pixels_labels_and_order(tmp_path, keys):
  train_x, train_y, test_x, test_y = write_npz(tmp_path / "a.npz", keys)
  data = load(f"npz:{tmp_path / 'a.npz'}")
  np.testing.assert_array_equal(data.train.images, train_x)
  np.testing.assert_array_equal(data.train.labels, train_y)
  np.testing.assert_array_equal(data.test.images, test_x)
  np.testing.assert_array_equal(data.test.labels, test_y)
  assert data.train.labels.dtype == np.int32
  assert data.class_names == ("0", "1", "2")
  assert (len(data.train), len(data.test)) == (9, 6)


def test_npz_takes_column_labels_and_class_names(tmp_path):
  _, labels = arrays(9)
  write_npz(tmp_path / "a.npz", train_labels=labels[:, None], class_names=["x", "y", "z", "w"])
  data = load(f"npz:{tmp_path / 'a.npz'}")
  np.testing.assert_array_equal(data.train.labels, labels)
  assert data.class_names == ("x", "y", "z", "w")


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ({"train_images": np.zeros((9, 8, 8, 3), np.float32)}, "float32.*uint8"),
    ({"train_images": np.zeros((9, 8, 8), np.uint8)}, r"\(9, 8, 8\).*np.repeat"),
    ({"train_images": np.zeros((9, 3, 8, 8), np.uint8)}, "transpose"),
    ({"train_images": np.zeros((9, 8, 7, 3), np.uint8)}, "8x7 pixels"),
    ({"test_images": np.zeros((6, 4, 4, 3), np.uint8)}, "test.*4x4.*image_size=4"),
    ({"train_images": np.zeros((0, 8, 8, 3), np.uint8), "train_labels": np.zeros(0, int)}, "no im"),
    ({"train_labels": np.zeros(8, int)}, r"\(8,\) for 9 images"),
    ({"train_labels": np.zeros(9)}, "float64.*integers"),
    ({"train_labels": np.full(9, -1)}, r"-1\.\.-1"),
    (
      {"train_labels": np.full(9, -1), "test_labels": np.full(6, -2)},
      "labels go up to -1; number the classes from 0",
    ),
    ({"test_labels": np.full(6, 2**32), "class_names": ["a", "b", "c"]}, "4294967296.*3 classes"),
    ({"train_labels": np.zeros(9, int), "test_labels": np.zeros(6, int)}, "one class"),
    ({"class_names": np.array([{}], dtype=object)}, "cannot be read"),
  ],
)
def test_npz_refuses(tmp_path, extra, message):
  write_npz(tmp_path / "a.npz", **extra)
  with pytest.raises(UserError, match=message):
    load(f"npz:{tmp_path / 'a.npz'}")


def test_npz_missing_truncated_or_with_other_keys(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(UserError, match="does not exist"):
    load(f"npz:{path}")
  write_npz(path)
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(UserError, match="cannot be read"):
    load(f"npz:{path}")
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(UserError, match="cannot be read"):
    load(f"npz:{path}")
  np.savez(path, images=np.zeros(3))
  with pytest.raises(UserError, match=r"\['images'\].*x_train"):
    load(f"npz:{path}")


@pytest.mark.parametrize("name", ["cifar100", "npz", "npz:", "cifar10:x", "zip:a"])
def test_unknown_name_lists_the_four_forms(name):
  with pytest.raises(UserError, match="cifar10, shapes, npz:PATH, folder:PATH"):
    load(name)


@pytest.mark.parametrize("size", [1, 31, 64])
def test_cifar10_of_another_size_is_refused_unread(monkeypatch, size):
  monkeypatch.setattr(cifar10, "load_cifar10", lambda **arguments: pytest.fail("it was loaded"))
  with pytest.raises(UserError, match=f"image_size={size} .*must be 32 for cifar10"):
    load("cifar10", image_size=size)


def test_shapes_passes_the_image_size(monkeypatch):
  monkeypatch.setattr(source, "SHAPES_TRAIN", 20)
  monkeypatch.setattr(source, "SHAPES_TEST", 10)
  data = load("shapes", image_size=24)
  assert data.train.images.shape == (20, 24, 24, 3)
  assert data.test.images.shape == (10, 24, 24, 3)
  assert data.train.images.dtype == np.uint8
  assert data.train.labels.dtype == np.int32


def save_images(folder, colours, mode="RGB", suffix="png", size=(20, 10)):
  folder.mkdir(parents=True)
  for i, colour in enumerate(colours):
    Image.new("RGB", size, colour).convert(mode).save(folder / f"{i:02d}.{suffix}")


def test_folder_with_train_and_test(tmp_path):
  for part, count in (("train", 3), ("test", 2)):
    save_images(tmp_path / part / "red", [(255, 0, 0)] * count)
    save_images(tmp_path / part / "blue", [(0, 0, 255)] * count, suffix="bmp")
  (tmp_path / "train" / "red" / "notes.txt").write_text("not an image")
  (tmp_path / "train" / ".cache").mkdir()
  data = load(f"folder:{tmp_path}")
  assert data.class_names == ("blue", "red")
  np.testing.assert_array_equal(data.train.labels, [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(data.test.labels, [0, 0, 1, 1])
  assert data.train.images.shape == (6, 8, 8, 3)
  np.testing.assert_array_equal(data.train.images[0], np.broadcast_to([0, 0, 255], (8, 8, 3)))
  np.testing.assert_array_equal(data.train.images[5], np.broadcast_to([255, 0, 0], (8, 8, 3)))


def test_folder_holds_out_a_fixed_sixth_of_each_class(tmp_path):
  save_images(tmp_path / "a", [(i, 0, 0) for i in range(12)], size=(8, 8))
  save_images(tmp_path / "b", [(0, i, 0) for i in range(18)], size=(8, 8))
  first, second = load(f"folder:{tmp_path}"), load(f"folder:{tmp_path}")
  np.testing.assert_array_equal(first.test.images, second.test.images)
  np.testing.assert_array_equal(np.bincount(first.test.labels), [2, 3])
  np.testing.assert_array_equal(np.bincount(first.train.labels), [10, 15])
  both = np.concatenate([first.train.images, first.test.images])[:, 0, 0]
  assert len(np.unique(both, axis=0)) == 29  # (0, 0, 0) is in either class


@pytest.mark.parametrize(
  ("mode", "suffix"), [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("RGBA", "webp"), ("1", "bmp")]
)
def test_folder_reads_every_mode(tmp_path, mode, suffix):
  save_images(tmp_path / "a", [(255, 255, 255)] * 2, mode, suffix)
  save_images(tmp_path / "b", [(0, 0, 0)] * 2, mode, suffix)
  data = load(f"folder:{tmp_path}")
  np.testing.assert_allclose(data.train.images[0], 255, atol=3)
  np.testing.assert_allclose(data.train.images[1], 0, atol=3)


def save_glass(path, mode):
  """Left half opaque red (in "LA" grey 76), right half transparent black."""
  pixels = np.zeros((8, 8, 4), np.uint8)
  pixels[:, :4] = (255, 0, 0, 255)
  Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "gif")])
def test_what_is_transparent_shows_white(tmp_path, mode, suffix):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for i in range(2):
      save_glass(tmp_path / name / f"{i}.{suffix}", mode)
  image = load(f"folder:{tmp_path}").train.images[0]
  np.testing.assert_array_equal(image[:, 4:], np.full((8, 4, 3), 255))
  opaque = (76, 76, 76) if mode == "LA" else (255, 0, 0)
  np.testing.assert_array_equal(image[:, :4], np.broadcast_to(opaque, (8, 4, 3)))


def test_folder_scales_16_bit_grey_and_does_not_alias(tmp_path):
  grey = np.full((8, 8), 0x8000, np.uint16)
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  for name, image in (("grey", grey), ("stripes", stripes)):
    (tmp_path / name).mkdir()
    for i in range(2):
      Image.fromarray(image).save(tmp_path / name / f"{i}.png")
  data = load(f"folder:{tmp_path}")
  np.testing.assert_array_equal(data.train.images[0], np.full((8, 8, 3), 0x80))
  # One column of 64 in eight would be all black or all white if it was picked.
  np.testing.assert_allclose(data.train.images[1].astype(int), 127, atol=20)


def test_folder_errors_name_the_culprit(tmp_path):
  with pytest.raises(UserError, match="not a directory"):
    load(f"folder:{tmp_path / 'none'}")
  save_images(tmp_path / "one" / "cat", [(1, 2, 3)])
  with pytest.raises(UserError, match=r"\['cat'\].*at least two"):
    load(f"folder:{tmp_path / 'one'}")
  save_images(tmp_path / "one" / "dog", [(1, 2, 3)] * 2)
  with pytest.raises(UserError, match="'cat' has 1 image"):
    load(f"folder:{tmp_path / 'one'}")
  (tmp_path / "one" / "emu").mkdir()
  with pytest.raises(UserError, match=r"no images .*\['emu'\]"):
    load(f"folder:{tmp_path / 'one'}")
  (tmp_path / "one" / "emu").rmdir()
  save_images(tmp_path / "one" / "fox", [(1, 2, 3)] * 2)
  (tmp_path / "one" / "cat" / "x.png").write_bytes(b"no picture")
  with pytest.raises(UserError, match=r"cat/x\.png cannot be read"):
    load(f"folder:{tmp_path / 'one'}")


def test_folder_with_half_a_split_or_other_classes(tmp_path):
  for name in ("train/a", "train/b"):
    save_images(tmp_path / name, [(0, 0, 0)])
  with pytest.raises(UserError, match="train/ but not both"):
    load(f"folder:{tmp_path}")
  for name in ("test/a", "test/c"):
    save_images(tmp_path / name, [(0, 0, 0)])
  with pytest.raises(UserError, match=r"\['b', 'c'\]"):
    load(f"folder:{tmp_path}")


def test_split_validation_is_fixed_and_loses_nothing():
  images = np.arange(50, dtype=np.uint8).repeat(3).reshape(50, 1, 1, 3)
  split = Split(images, np.arange(50, dtype=np.int32))
  train, held = source.split_validation(split, validation_size=10)
  assert (len(train), len(held)) == (40, 10)
  assert sorted([*train.labels, *held.labels]) == list(range(50))
  np.testing.assert_array_equal(held.images[:, 0, 0, 0], held.labels)
  assert list(held.labels) == list(np.random.default_rng(0).permutation(50)[-10:])
  _, smaller = source.split_validation(split, validation_size=4)
  np.testing.assert_array_equal(smaller.labels, held.labels[-4:])
  everything, none = source.split_validation(split, validation_size=0)
  assert (len(everything), len(none)) == (50, 0)
  assert none.images.shape == (0, 1, 1, 3)


@pytest.mark.parametrize("size", [-1, 6, 7])
def test_split_validation_refuses(size):
  with pytest.raises(UserError, match=f"validation_size={size} .*from 0 to 5"):
    source.split_validation(Split(*arrays(6)), validation_size=size)


def test_channel_stats_match_floats_and_are_exact():
  images, _ = arrays(230, size=5)
  mean, std = source.channel_stats(images)
  np.testing.assert_allclose(mean, (images / 255.0).mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, (images / 255.0).std((0, 1, 2)), rtol=1e-12)
  assert source.channel_stats(np.full((3, 7, 7, 3), 85, np.uint8)) == ((1 / 3,) * 3, (0.0,) * 3)


def test_check_split_accepts_a_good_one():
  check_split(Split(*arrays()), num_classes=3, where="x")
  with pytest.raises(UserError, match=r"x: labels lie in 0\.\.2 but there are 2"):
    check_split(Split(*arrays()), num_classes=2, where="x")


@pytest.mark.skipif(
  "TFDS_DATA_DIR" not in os.environ or not PREPARED.is_dir(),
  reason="TFDS_DATA_DIR is not set or has no cifar10 directory",
)
def test_real_cifar10():
  start = time.monotonic()
  data = source.load_dataset(name="cifar10", dir="", image_size=32)
  assert time.monotonic() - start < 30  # 5 s on two idle cores
  assert (len(data.train), len(data.test)) == (50_000, 10_000)
  np.testing.assert_array_equal(np.bincount(data.train.labels), [5_000] * 10)
  np.testing.assert_array_equal(np.bincount(data.test.labels), [1_000] * 10)
  mean, std = source.channel_stats(data.train.images)
  np.testing.assert_allclose(mean, (0.49139968, 0.48215841, 0.44653091), atol=1e-7)
  np.testing.assert_allclose(std, (0.24703223, 0.24348513, 0.26158784), atol=1e-7)
  # The class that looks like its name: ships and planes are blue, frogs are not.
  blue = [data.train.images[data.train.labels == c][..., 2].mean() for c in (0, 6, 8)]
  assert blue[1] < min(blue[0], blue[2])
