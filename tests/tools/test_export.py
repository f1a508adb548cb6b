"""An exported network gives the probabilities of the network, without this package."""

import runpy
import subprocess
import sys

import jax.export
import numpy as np
import PIL.Image
import pytest

import flax_cifar
from flax_cifar import errors
from flax_cifar.data.sources import folder as folder_lib
from flax_cifar.tools import export, predict


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  path = tmp_path_factory.mktemp("export") / "it's.stablehlo"
  export.export(export.parse(["--model=tiny50k", f"--out={path}"]))
  return path


def test_any_number_of_images_gets_the_probabilities_of_the_network(exported):
  program = jax.export.deserialize(exported.read_bytes())
  network = flax_cifar.load_pretrained("tiny50k")
  assert set(program.platforms) == set(export.PLATFORMS)
  for count in (1, 5):
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(program.call(images), network.predict(images), atol=1e-5)


def run_example(exported, folder):
  """What the example prints; it runs in `folder`, where neither this package nor Flax is."""
  script = exported.with_name(f"{exported.name}.py")
  code = (
    "import runpy, sys; sys.modules['flax_cifar'] = sys.modules['flax'] = None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
  )
  command = [sys.executable, "-c", code, str(script)]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_the_example_runs_in_any_folder_where_this_package_is_not(exported, tmp_path):
  network = flax_cifar.load_pretrained("tiny50k")
  black = network.predict(np.zeros((1, 32, 32, 3), np.uint8))[0].argmax()
  assert run_example(exported, tmp_path) == network.class_names[black]


def write_pictures(folder):
  """A photo that lies on its side, and a picture whose black pixels are transparent."""
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  photo = PIL.Image.fromarray(pixels).resize((70, 50))
  exif = photo.getexif()
  exif[folder_lib.ORIENTATION] = 6
  photo.save(folder / "photo.jpg", exif=exif)
  PIL.Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(folder / "clear.png")
  return [folder / "photo.jpg", folder / "clear.png"]


def test_the_example_sees_and_names_a_picture_as_predict_does(
  exported, tmp_path, monkeypatch, capsys
):
  script = str(exported.with_name(f"{exported.name}.py"))
  for path in write_pictures(tmp_path):
    monkeypatch.setattr(sys, "argv", [script, str(path)])
    seen = runpy.run_path(script)["image"]
    (expected,) = folder_lib.read_images([path], 32)
    np.testing.assert_allclose(seen.astype(int), expected.astype(int), atol=1)  # it turns first
    (prediction,) = predict.predict(predict.parse([str(path), "--model=tiny50k"]))
    assert capsys.readouterr().out.strip() == prediction.classes[0]


@pytest.mark.parametrize("name", [".", "..", "", "/", "new", "no/a"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "new").mkdir()
  with pytest.raises(errors.UserError, match=r"^--out='.*' is not valid; it must be"):
    export.parse([f"--out={name}", "--weights=missing"])


def test_the_weights_are_not_replaced_by_their_program(tmp_path):
  path = tmp_path / "mine.safetensors"
  path.touch()
  with pytest.raises(errors.UserError, match=r"another file than the weights"):
    export.parse([f"--out={path}", f"--weights={path}"])


def test_a_program_of_the_user_is_not_replaced_by_the_example(exported, tmp_path):
  example = exported.with_name(f"{exported.name}.py")
  assert export.parse(["--model=tiny50k", f"--out={exported}"]).example == example
  (tmp_path / "main.py").write_text("print('mine')")
  with pytest.raises(errors.UserError, match=r"main.py', where the example belongs, is another"):
    export.parse(["--model=tiny50k", f"--out={tmp_path / 'main'}"])


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  def fail(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(export.files, "write_bytes", fail)
  options = export.parse(["--model=tiny50k", f"--out={tmp_path / 'a'}", "--platforms", "cpu"])
  with pytest.raises(errors.UserError, match=r"--out=.*cannot be written \(No space left"):
    export.export(options)


def test_a_program_has_the_platforms_that_are_asked_for(tmp_path):
  path = tmp_path / "a"
  export.export(export.parse(["--model=tiny50k", f"--out={path}", "--platforms", "cpu"]))
  assert jax.export.deserialize(path.read_bytes()).platforms == ("cpu",)
