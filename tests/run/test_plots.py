"""The plots of a run: their files, titles and curves."""

import os
import subprocess
import sys

import matplotlib
import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from flax_cifar.data import dataset
from flax_cifar.run import plots

NAMES = ("cat", "dog", "frog")


@pytest.fixture
def titles(monkeypatch):
  """Collects the titles that are drawn."""
  seen = []
  original = matplotlib.axes.Axes.text

  def remember(self, x, y, label, *args, **kwargs):
    seen.append(label)
    return original(self, x, y, label, *args, **kwargs)

  monkeypatch.setattr(matplotlib.axes.Axes, "text", remember)
  return seen


def images(count):
  return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_misclassified_shows_only_errors_as_predicted_and_actual(tmp_path, titles):
  labels, predicted = np.array([0, 1, 2, 1]), np.array([0, 2, 2, 0])
  split = dataset.Split(images(4), labels)
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[predicted], NAMES)
  assert titles == ["frog / dog", "cat / dog"]
  assert Image.open(tmp_path / "m.png").size[0] > 300


def test_without_misclassified_images_the_plot_is_still_written(tmp_path, titles):
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3), NAMES)
  assert titles == []
  assert (tmp_path / "m.png").exists()


def test_augmented_samples_have_their_class_names(tmp_path, titles):
  batch = {"image": images(25), "label": np.arange(25) % 3}
  plots.save_augmented(tmp_path / "a.png", batch, NAMES)
  assert titles == [NAMES[i % 3] for i in range(20)]


def test_images_stand_in_rows_upright_and_in_their_colors(tmp_path):
  shown = np.full((7, 2, 2, 3), 255, np.uint8)
  shown[:, 0, 0] = [[20 * i, 100, 0] for i in range(7)]  # the upper left corner
  plots.save_images(tmp_path / "i.png", shown, ["name"] * 7)
  picture = np.asarray(Image.open(tmp_path / "i.png").convert("RGB"))
  assert picture.shape[:2] == (round(2 * 1.9 * plots.DPI), round(5 * 1.7 * plots.DPI))
  for i, image in enumerate(shown):
    row, column = divmod(i, 5)
    cell = picture[row * 228 : (row + 1) * 228, column * 204 : (column + 1) * 204]
    found = (cell == image[0, 0]).all(-1)
    assert found.sum() == pytest.approx((plots.IMAGE * plots.DPI / 2) ** 2, rel=0.05)
    rows, columns = np.nonzero(found)
    assert rows.max() < 228 * 0.7
    assert columns.max() < 204 * 0.6


def test_a_plot_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
  class FigureOnAFullDisk:
    def savefig(self, path, **options):
      path.write_bytes(b"half")
      raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    plots.save_figure(FigureOnAFullDisk(), tmp_path / "a.png")
  assert not (tmp_path / "a.png").exists()


def test_curves_have_a_line_per_split_and_metric(tmp_path, monkeypatch):
  drawn = []
  original = matplotlib.axes.Axes.plot

  def remember(self, x, y, *args, **kwargs):
    drawn.append((list(x), list(y)))
    return original(self, x, y, *args, **kwargs)

  monkeypatch.setattr(matplotlib.axes.Axes, "plot", remember)
  record = {"train_loss": 2.0, "train_accuracy": 0.25, "learning_rate": 0.1}
  records = [record | {"epoch": 1}, record | {"epoch": 2}]
  records[1] |= {"validation_loss": 1.0, "validation_accuracy": 0.5}
  plots.save_curves(tmp_path / "c.png", records)
  plots.save_learning_rate(tmp_path / "l.png", records)
  assert drawn == [
    ([1, 2], [2.0, 2.0]),
    ([1, 2], [25.0, 25.0]),
    ([2], [1.0]),
    ([2], [50.0]),
    ([1, 2], [0.1, 0.1]),
  ]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", ""])
def test_plots_need_no_backend(tmp_path, backend):
  code = f"""
import pathlib, numpy as np
from flax_cifar.run import plots
record = {{"epoch": 1, "learning_rate": 0.1}}
plots.save_learning_rate(pathlib.Path({str(tmp_path)!r}) / "l.png", [record])
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "MPLBACKEND": backend},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert (tmp_path / "l.png").stat().st_size > 1000


def test_the_style_and_backend_of_the_user_neither_matter_nor_change(tmp_path):
  records = [{"epoch": 1, "learning_rate": 0.1}, {"epoch": 2, "learning_rate": 0.2}]
  plots.save_learning_rate(tmp_path / "plain.png", records)
  with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 9}):
    before = dict(matplotlib.rcParams)
    plots.save_learning_rate(tmp_path / "styled.png", records)
    assert dict(matplotlib.rcParams) == before
  assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("odd"), MemoryError()])
def test_a_plot_that_fails_is_a_warning(tmp_path, monkeypatch, capsys, error):
  def fail(figure, path):
    raise error

  monkeypatch.setattr(plots, "save_figure", fail)
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[[1, 1, 1]], NAMES)
  stderr = capsys.readouterr().err
  assert stderr.startswith(f"warning: {str(tmp_path / 'm.png')!r} is not drawn (")
  assert stderr.count("\n") == 1


def test_long_and_chinese_names_fit_and_give_no_warning(tmp_path, titles, recwarn):
  names = ("american_pit_bull_terrier", "staffordshire_bull_terrier", "猫" * 30)
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[[1, 2, 0]], names)
  assert titles[0] == "staffordshire_bull_te…\namerican_pit_bull_ter…"
  assert titles[1].startswith("猫" * 10 + "…")
  assert not recwarn.list
