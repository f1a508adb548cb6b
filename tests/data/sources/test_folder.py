"""Data sets in folders of images."""

import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from flax_cifar import errors
from flax_cifar.data.sources import folder
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


FOLDER_FORMATS = (
  *("avif", "bmp", "dds", "gif", "ico", "jp2", "jpg", "pcx", "png", "ppm", "pgm", "qoi", "sgi"),
  *("tga", "tif", "webp"),
)


@pytest.mark.parametrize("suffix", [*FOLDER_FORMATS, "PNG", "JPEG"])
def test_every_common_format_is_read(tmp_path, suffix):
  for name, color in (("a", (250, 0, 0)), ("b", (0, 0, 250))):
    save_images(tmp_path / name, [color] * 2, suffix=suffix, size=(16, 16))
  image = test_load.load(f"folder:{tmp_path}").train.images[0]
  red = image[..., 0].astype(int)
  assert (red > 60).all()
  np.testing.assert_allclose(red, red[0, 0], atol=12)


def test_a_suffix_may_be_wrong(tmp_path):
  for name in ("a", "b"):
    save_images(tmp_path / name, [(9, 9, 9)] * 2, suffix="bmp")
    (tmp_path / name / "00.bmp").rename(tmp_path / name / "00.png")
  assert len(test_load.load(f"folder:{tmp_path}").train) == 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_postscript_starts_no_program_whatever_its_name(tmp_path, suffix, monkeypatch):
  """Pillow would call Ghostscript, gs, for it."""
  for name in ("a", "b"):
    save_images(tmp_path / name, [(9, 9, 9)] * 2)
  text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
  (tmp_path / "a" / f"x.{suffix}").write_text(text)
  program = tmp_path / ".bin" / "gs"
  program.parent.mkdir()
  program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'called'}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
  with pytest.raises(errors.UserError, match=rf"a/x\.{suffix} \(it is in none of the formats"):
    test_load.load(f"folder:{tmp_path}")
  assert not (tmp_path / "called").exists()


def test_folders_within_a_class_and_links_belong_to_it(tmp_path):
  save_images(tmp_path / "a" / "x" / "y", [(255, 0, 0)] * 3)
  save_images(tmp_path / "a" / ".cache", [(0, 255, 0)] * 3)
  save_images(tmp_path / "b", [(0, 0, 255)] * 2)
  (tmp_path / "a" / "x" / "back").symlink_to(tmp_path / "a")
  data = test_load.load(f"folder:{tmp_path}")
  np.testing.assert_array_equal(np.bincount(data.train.labels), [2, 1])
  assert data.test_is_held_out


@pytest.mark.parametrize(
  ("train", "validation", "test"),
  [("train", "val", "test"), ("Training", "VALID", "Testing"), ("train", "validation", "test")],
)
def test_the_splits_have_their_usual_names(tmp_path, train, validation, test):
  for part, count in ((train, 3), (validation, 1), (test, 2)):
    for name in ("a", "b"):
      save_images(tmp_path / part / name, [(9, 9, 9)] * count)
  data = test_load.load(f"folder:{tmp_path}")
  assert [len(s) for s in (data.train, data.validation, data.test)] == [6, 2, 4]
  assert not data.test_is_held_out


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("test", "train"), ("val", "x")])
def test_a_class_may_have_the_name_of_a_split(tmp_path, classes):
  for name in classes:
    save_images(tmp_path / name, [(9, 9, 9)] * 2)
  assert test_load.load(f"folder:{tmp_path}").class_names == classes
  save_images(tmp_path / classes[-1] / "more", [(9, 9, 9)])
  assert test_load.load(f"folder:{tmp_path}").class_names == classes


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
  for name in ("train/a", "train/b", "test/a", "test/b", "unlabeled/a"):
    save_images(tmp_path / name, [(9, 9, 9)])
  for name in ("train/a/note.txt", "train/loose.png", "labels.csv", "train/a/._00.png", ".x"):
    (tmp_path / name).write_bytes(b"\0\5\x16\7")
  (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
  (tmp_path / "__MACOSX" / "a" / "x.png").write_bytes(b"x")
  data = test_load.load(f"folder:{tmp_path}")
  assert (len(data.train), len(data.test)) == (2, 2)
  warning = capsys.readouterr().err
  assert warning == (
    f"warning: folder:{tmp_path}: left out 4 files that are no images or lie outside the class "
    "directories: labels.csv, train/a/note.txt, train/loose.png, unlabeled/a/00.png\n"
  )


def test_complete_folders_give_no_warning(tmp_path, capsys):
  for name in ("a", "b"):
    save_images(tmp_path / name, [(9, 9, 9)] * 2)
  test_load.load(f"folder:{tmp_path}")
  assert capsys.readouterr().err == ""


SIDEWAYS = (0x112, 3, 1, struct.pack("<HH", 6, 0))  # orientation 6: turn by 90 degrees


def make_exif(*entries):
  """A block of EXIF with one directory; each entry is (tag, type, count, four bytes)."""
  body = b"II" + struct.pack("<HIH", 42, 8, len(entries))
  body += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
  return b"Exif\0\0" + body + struct.pack("<I", 0)


@pytest.mark.parametrize(
  "odd",
  [
    (),
    ((0x11A, 2, 4, b"72\0\0"),),  # a resolution that is text
    ((0xA005, 2, 4, b"R98\0"),),  # a directory that is text
    ((0x8769, 4, 1, struct.pack("<I", 2**31)),),  # a directory beyond the end
    ((0x10F, 99, 4, b"abcd"),),  # an unknown type
  ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sideways_photos_are_turned_whatever_their_other_metadata(tmp_path, format, odd):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:, :4] = (250, 0, 0)  # the left half; after the turn, the upper half
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for i in range(2):
      path = tmp_path / name / f"{i}.{format.lower()}"
      if format == "TIFF":
        Image.fromarray(pixels).save(path, format, tiffinfo={0x112: 6})
      else:
        Image.fromarray(pixels).save(path, format, exif=make_exif(SIDEWAYS, *odd))
  image = test_load.load(f"folder:{tmp_path}").train.images[0]
  assert image[:3, :, 0].mean() > 200
  assert image[-3:, :, 0].mean() < 50


def test_all_eight_orientations_equal_pillows(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
  expected = []
  for name, orientations in (("a", range(1, 5)), ("b", range(5, 9))):
    (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "test" / name).mkdir(parents=True)
    for orientation in orientations:
      exif = Image.Exif()
      exif[0x112] = orientation
      path = tmp_path / "train" / name / f"{orientation}.png"
      Image.fromarray(pixels).save(path, exif=exif)
      expected.append(np.asarray(ImageOps.exif_transpose(Image.open(path))))
    Image.fromarray(pixels).save(tmp_path / "test" / name / "x.png")
  images = test_load.load(f"folder:{tmp_path}").train.images
  np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_deep_images_are_scaled_by_the_bits_that_the_data_set_uses(tmp_path, bits, top):
  """The dark image of the second class has its brightness relative to the first."""
  for name, value in (("bright", top), ("dark", top // 4)):
    (tmp_path / name).mkdir()
    for i, suffix in enumerate(("png", "tif", "tif")):
      gray = np.full((8, 8), value, np.int32 if i == 2 else np.uint16)
      Image.fromarray(gray).save(tmp_path / name / f"{i}.{suffix}")
  data = test_load.load(f"folder:{tmp_path}")
  assert (data.train.images[data.train.labels == 0] == 255).all()
  dark = data.train.images[data.train.labels == 1]
  np.testing.assert_allclose(dark.astype(int), 64, atol=1)


def test_the_white_of_deep_images_is_told_where_no_data_set_shows_it(tmp_path, capsys):
  Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "a.png")
  (image,) = folder.read_images([tmp_path / "a.png"], 8)
  assert abs(int(image[0, 0, 0]) - 3000 * 255 / 4095) <= 0.5
  assert "1 images have more than 8 bits; 4095 is taken as their white" in capsys.readouterr().err


def test_floats_up_to_one_have_their_white_at_one_and_others_are_refused(tmp_path):
  for name, value in (("a", 1.0), ("b", 0.5)):
    (tmp_path / name).mkdir()
    for i in range(2):
      Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / name / f"{i}.tif")
  data = test_load.load(f"folder:{tmp_path}")
  assert [int(image[0, 0, 0]) for image in data.train.images] == [255, 128]
  for value in (-1, 1e6, np.nan):
    Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(errors.UserError, match=r"a/0\.tif \(its values lie in .*8 or 16 bits"):
      test_load.load(f"folder:{tmp_path}")


def test_all_damaged_images_are_named_at_once(tmp_path):
  for name in ("a", "b"):
    save_images(tmp_path / name, [(9, 9, 9)] * 30)
  for number in range(0, 30, 2):
    (tmp_path / "a" / f"{number:02d}.png").write_bytes(b"no picture")
    (tmp_path / "b" / f"{number:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  with pytest.raises(errors.UserError) as raised:
    test_load.load(f"folder:{tmp_path}")
  message = str(raised.value)
  assert "30 of 60 images cannot be read" in message
  assert message.count(".png (") == 20
  assert "and 10 more" in message


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
  for name in ("cat", "dog"):
    save_images(tmp_path / name / "more", [(1, 2, 3)] * 2)
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith("dog/more"):  # permissions do not bind the superuser
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(errors.UserError, match=r"cannot be read .*Permission denied: '.*dog/more'"):
    test_load.load(f"folder:{tmp_path}")


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
  with pytest.raises(errors.UserError, match=r"1 of 6 images cannot be read; .*cat/x\.png"):
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
