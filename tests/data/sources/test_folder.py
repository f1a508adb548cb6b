"""Data sets in folders of images."""

import numpy as np
import pytest
from PIL import Image

from flax_cifar import errors
from tests.data import test_load


def save_images(folder, colors, mode="RGB", suffix="png", size=(20, 10)):
  folder.mkdir(parents=True)
  for i, color in enumerate(colors):
    Image.new("RGB", size, color).convert(mode).save(folder / f"{i:02d}.{suffix}")


def test_folder_with_train_and_test(tmp_path):
  for part, count in (("train", 3), ("test", 2)):
    save_images(tmp_path / part / "red", [(255, 0, 0)] * count)
    save_images(tmp_path / part / "blue", [(0, 0, 255)] * count, suffix="bmp")
  (tmp_path / "train" / "red" / "notes.txt").write_text("not an image")
  (tmp_path / "train" / ".cache").mkdir()
  data = test_load.load(f"folder:{tmp_path}")
  assert data.class_names == ("blue", "red")
  np.testing.assert_array_equal(data.train.labels, [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(data.test.labels, [0, 0, 1, 1])
  assert data.train.images.shape == (6, 8, 8, 3)
  np.testing.assert_array_equal(data.train.images[0], np.broadcast_to([0, 0, 255], (8, 8, 3)))
  np.testing.assert_array_equal(data.train.images[5], np.broadcast_to([255, 0, 0], (8, 8, 3)))


def test_folder_holds_out_a_fixed_sixth_of_each_class(tmp_path):
  save_images(tmp_path / "a", [(i, 0, 0) for i in range(12)], size=(8, 8))
  save_images(tmp_path / "b", [(0, i, 0) for i in range(18)], size=(8, 8))
  first, second = test_load.load(f"folder:{tmp_path}"), test_load.load(f"folder:{tmp_path}")
  np.testing.assert_array_equal(first.test.images, second.test.images)
  np.testing.assert_array_equal(np.bincount(first.test.labels), [2, 3])
  np.testing.assert_array_equal(np.bincount(first.train.labels), [10, 15])
  both = np.concatenate([first.train.images, first.test.images])[:, 0, 0]
  assert len(np.unique(both, axis=0)) == 29  # (0, 0, 0) is in both classes


@pytest.mark.parametrize(
  ("mode", "suffix"), [("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("RGBA", "webp"), ("1", "bmp")]
)
def test_folder_reads_every_mode(tmp_path, mode, suffix):
  save_images(tmp_path / "a", [(255, 255, 255)] * 2, mode, suffix)
  save_images(tmp_path / "b", [(0, 0, 0)] * 2, mode, suffix)
  data = test_load.load(f"folder:{tmp_path}")
  np.testing.assert_allclose(data.train.images[0], 255, atol=3)
  np.testing.assert_allclose(data.train.images[1], 0, atol=3)


def save_half_transparent(path, mode):
  """Left half opaque red (gray 76 in "LA"), right half transparent black."""
  pixels = np.zeros((8, 8, 4), np.uint8)
  pixels[:, :4] = (255, 0, 0, 255)
  Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "gif")])
def test_transparent_pixels_become_white(tmp_path, mode, suffix):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for i in range(2):
      save_half_transparent(tmp_path / name / f"{i}.{suffix}", mode)
  image = test_load.load(f"folder:{tmp_path}").train.images[0]
  np.testing.assert_array_equal(image[:, 4:], np.full((8, 4, 3), 255))
  opaque = (76, 76, 76) if mode == "LA" else (255, 0, 0)
  np.testing.assert_array_equal(image[:, :4], np.broadcast_to(opaque, (8, 4, 3)))


def test_folder_scales_16_bit_gray_and_does_not_alias(tmp_path):
  gray = np.full((8, 8), 0x8000, np.uint16)
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  for name, image in (("gray", gray), ("stripes", stripes)):
    (tmp_path / name).mkdir()
    for i in range(2):
      Image.fromarray(image).save(tmp_path / name / f"{i}.png")
  data = test_load.load(f"folder:{tmp_path}")
  np.testing.assert_array_equal(data.train.images[0], np.full((8, 8, 3), 0x80))
  # One column of 64 in eight would be all black or all white if it was picked.
  np.testing.assert_allclose(data.train.images[1].astype(int), 127, atol=20)


def test_folder_errors_name_the_culprit(tmp_path):
  with pytest.raises(errors.UserError, match="not a directory"):
    test_load.load(f"folder:{tmp_path / 'none'}")
  save_images(tmp_path / "one" / "cat", [(1, 2, 3)])
  with pytest.raises(errors.UserError, match=r"\['cat'\].*at least two"):
    test_load.load(f"folder:{tmp_path / 'one'}")
  save_images(tmp_path / "one" / "dog", [(1, 2, 3)] * 2)
  with pytest.raises(errors.UserError, match="'cat' has 1 image"):
    test_load.load(f"folder:{tmp_path / 'one'}")
  (tmp_path / "one" / "emu").mkdir()
  with pytest.raises(errors.UserError, match=r"no images .*\['emu'\]"):
    test_load.load(f"folder:{tmp_path / 'one'}")
  (tmp_path / "one" / "emu").rmdir()
  save_images(tmp_path / "one" / "fox", [(1, 2, 3)] * 2)
  (tmp_path / "one" / "cat" / "x.png").write_bytes(b"no picture")
  with pytest.raises(errors.UserError, match=r"cat/x\.png cannot be read"):
    test_load.load(f"folder:{tmp_path / 'one'}")


def test_folder_with_half_a_split_or_other_classes(tmp_path):
  for name in ("train/a", "train/b"):
    save_images(tmp_path / name, [(0, 0, 0)])
  with pytest.raises(errors.UserError, match="train/ but not both"):
    test_load.load(f"folder:{tmp_path}")
  for name in ("test/a", "test/c"):
    save_images(tmp_path / name, [(0, 0, 0)])
  with pytest.raises(errors.UserError, match=r"\['b', 'c'\]"):
    test_load.load(f"folder:{tmp_path}")
