"""Pictures of any size get the classes that the network of the package gives their pixels."""

import json
import sys

import numpy as np
import PIL.Image
import pytest

import flax_cifar
from flax_cifar import errors
from flax_cifar.tools import predict


def draw(path, *shape):
  path.parent.mkdir(exist_ok=True)
  pixels = np.random.default_rng(len(path.name)).integers(0, 256, shape).astype(np.uint8)
  PIL.Image.fromarray(pixels).save(path)
  return pixels


def run(*arguments):
  return predict.predict(predict.parse(["--model=skip-long", *map(str, arguments)]))


def test_the_classes_are_those_of_the_pixels(tmp_path):
  pixels = draw(tmp_path / "more" / "a.png", 32, 32, 3)
  draw(tmp_path / "more" / "wide.jpg", 50, 300, 3)
  gray = draw(tmp_path / "gray.png", 32, 32)
  found = run(
    tmp_path / "gray.png", tmp_path / "more", "--top=10", f"--picture={tmp_path / 'p.png'}"
  )
  assert [one.file.rpartition("/")[2] for one in found] == ["gray.png", "a.png", "wide.jpg"]
  network = flax_cifar.load_pretrained("skip-long")
  expected = network.predict(np.stack([np.repeat(gray[..., None], 3, -1), pixels]))
  for one, row in zip(found, expected, strict=False):
    assert one.classes == [network.class_names[i] for i in (-row).argsort()]
    np.testing.assert_allclose(one.probabilities, np.sort(row)[::-1], rtol=1e-4)
  with PIL.Image.open(tmp_path / "p.png") as picture:
    assert picture.size[0] > 100


def test_lines_and_json(tmp_path, monkeypatch, capsys):
  draw(tmp_path / "a.png", 40, 20, 3)
  arguments = ["predict", str(tmp_path / "a.png"), "--model=skip-long", "--top=2"]
  monkeypatch.setattr(sys, "argv", arguments)
  predict.main()
  words = capsys.readouterr().out.split()
  monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
  predict.main()
  (found,) = json.loads(capsys.readouterr().out)
  shares = [f"{share:.1%}" for share in found["probabilities"]]
  assert words == [found["file"], found["classes"][0], shares[0], found["classes"][1], shares[1]]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["nowhere.png"], "'nowhere.png' does not exist"),
    (["text.txt"], r"1 of 1 images cannot be read; replace or remove text.txt \(it is in none"),
    (["empty"], "'empty' has no images"),
    (["a.png", "--top=0"], "--top=0 is not valid"),
    (["a.png", "--picture=../{here}/a.png"], r"a\.png' is one of the pictures to look at"),
    (["a.png", "--picture=none/p.png"], r"--picture='none/p.png' .*in a folder that exists"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  draw(tmp_path / "a.png", 8, 8, 3)
  (tmp_path / "text.txt").write_text("no picture")
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match=message):
    run(*(argument.format(here=tmp_path.name) for argument in arguments))


def test_the_picture_of_very_many_is_bounded(tmp_path, monkeypatch, capsys):
  draw(tmp_path / "in" / "a.png", 32, 32, 3)
  draw(tmp_path / "in" / "bb.png", 32, 32, 3)
  monkeypatch.setattr(predict, "SHOWN", 1)
  shown = []
  monkeypatch.setattr(predict, "save_picture", lambda path, *rest: shown.extend(map(len, rest)))
  assert len(run(tmp_path / "in", f"--picture={tmp_path / 'seen.png'}")) == 2
  assert shown == [1, 1]
  assert "--picture shows the first 1 of 2 pictures" in capsys.readouterr().err
