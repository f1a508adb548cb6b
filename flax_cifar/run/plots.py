"""Plots of a run: images with titles, loss and accuracy curves, the learning rate.

matplotlib is imported when the first one is drawn: it takes half a second, which would delay the
first step.
"""

import contextlib
import functools
import io
import itertools
import os
import pathlib
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flax_cifar import errors, files, metrics, optim
from flax_cifar.data import dataset, feeds

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

DPI = 120
RATE_POINTS = 1000  # at most, of a curve of the learning rate
CELL, IMAGE = (1.7, 1.9), 1.45  # inches of an image with its title, and of the image's sides
EAST_ASIAN_FONTS = (
  *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "IPAGothic", "NanumGothic"),
  *("Droid Sans Fallback", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Arial Unicode MS"),
)


def warn_on_failure(save: Callable[..., None]) -> Callable[..., bool]:
  """Makes `save(path, ...)` warn instead of raising, and draw in matplotlib's own style.

  Returns:
    A function that returns whether the plot is drawn.

  A plot is no reason to lose a run, and the user's style or backend must not change it.
  """

  @functools.wraps(save)
  def wrapped(path: pathlib.Path, *args: Any, **kwargs: Any) -> bool:
    try:
      with default_style():
        save(path, *args, **kwargs)
    except Exception as error:  # of matplotlib, Pillow or the disk
      errors.warn(f"{str(path)!r} is not drawn ({errors.shorten(error)})")
      return False
    return True

  return wrapped


@contextlib.contextmanager
def default_style() -> Iterator[None]:
  """Draws in matplotlib's own style, whatever the user's is, without warnings of its fonts."""
  _import_matplotlib()
  import matplotlib.style

  with warnings.catch_warnings(), matplotlib.style.context("default"):
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is drawn as a box
    yield


def _import_matplotlib() -> None:
  """Imports matplotlib, even where MPLBACKEND names a backend that is not installed here."""
  if "matplotlib" in sys.modules:
    return
  backend = os.environ.pop("MPLBACKEND", None)
  import matplotlib

  if backend is not None:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):  # files need no backend, but what the user draws may
      matplotlib.rcParams["backend"] = backend


def save_images(
  path: pathlib.Path, images: np.ndarray, titles: Sequence[str], *, columns: int = 5
) -> None:
  """Writes uint8 images (N, H, W, 3) as a grid with a title each.

  They share one axis, in inches: matplotlib takes seconds to lay out an axis for each.
  """
  from matplotlib.figure import Figure

  width, height = CELL[0] * columns, CELL[1] * max(1, -(-len(images) // columns))
  figure = Figure(figsize=(width, height))
  axis = figure.add_axes((0, 0, 1, 1))
  axis.set_axis_off()
  fonts = find_fonts("".join(titles))
  for i, (image, title) in enumerate(zip(images, titles, strict=False)):
    row, column = divmod(i, columns)
    left = CELL[0] * column + (CELL[0] - IMAGE) / 2
    bottom = CELL[1] * (row + 1) - 0.05
    extent = (left, left + IMAGE, bottom, bottom - IMAGE)
    axis.imshow(image, interpolation="nearest", aspect="auto", extent=extent)
    axis.text(
      left + IMAGE / 2,
      bottom - IMAGE - 0.04,
      "\n".join(map(shorten_name, title.split("\n"))),
      ha="center",
      va="bottom",
      fontsize=8,
      fontfamily=fonts,
      parse_math=False,  # a class may be called $x$
    )
  axis.set(xlim=(0, width), ylim=(height, 0))
  save_figure(figure, path)


def shorten_name(name: str, most: int = 22) -> str:
  """`name` cut to the width of `most` Latin letters, which an image has room for.

  >>> shorten_name("staffordshire_bull_terrier")
  'staffordshire_bull_te…'
  """
  widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name]
  if sum(widths) <= most:
    return name
  ends = itertools.accumulate(widths)
  return name[: sum(end < most for end in ends)] + "…"


def find_fonts(text: str) -> list[str]:
  """The font families that draw `text`; those for East Asian letters come where it has some."""
  families = ["DejaVu Sans"]
  if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    families += [family for family in EAST_ASIAN_FONTS if family in installed]
  return families


@warn_on_failure
def save_first_batch(path: pathlib.Path, feed: feeds.Feed, class_names: Sequence[str]) -> None:
  """Writes the first training batch of the run, unless the file exists."""
  if not path.exists():
    save_augmented(path, feed.batch_at(0), class_names)


def save_augmented(
  path: pathlib.Path, batch: dict[str, np.ndarray], class_names: Sequence[str], *, count: int = 20
) -> None:
  """Writes the first images of a training batch as the network gets them, before normalization."""
  titles = [class_names[label] for label in batch["label"][:count]]
  save_images(path, batch["image"][:count], titles)


@warn_on_failure
def save_misclassified(
  path: pathlib.Path,
  split: dataset.Split,
  logits: np.ndarray,
  class_names: Sequence[str],
  *,
  count: int = 20,
) -> None:
  """Writes the first wrongly classified images, titled `predicted / actual`."""
  predictions = logits.argmax(-1)
  wrong = np.flatnonzero(predictions != split.labels)[:count]
  pairs = [(class_names[predictions[i]], class_names[split.labels[i]]) for i in wrong]
  titles = [f"{a} / {b}" if len(a + b) < 20 else f"{a} /\n{b}" for a, b in pairs]
  save_images(path, split.images[wrong], titles)


@warn_on_failure
def save_curves(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
  """Writes loss and accuracy per epoch, for train and validation."""
  save_figure(draw_curves(records), path)


def draw_curves(records: Sequence[Mapping[str, Any]]) -> "Figure":
  """Draws loss and accuracy per epoch, for train and validation."""
  figure = create_figure(9, 3.5)
  loss, accuracy = figure.subplots(1, 2)
  for split in ("train", "validation"):
    shown = [record for record in records if f"{split}_loss" in record]
    epochs = [record["epoch"] for record in shown]
    loss.plot(epochs, [record[f"{split}_loss"] for record in shown], label=split)
    percent = [100 * record[f"{split}_accuracy"] for record in shown]
    accuracy.plot(epochs, percent, label=split)
  finish_axis(loss, "loss (nats)")
  finish_axis(accuracy, "accuracy (%)")
  return figure


@warn_on_failure
def save_learning_rate(
  path: pathlib.Path, records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
  """Writes the learning rate over the run of `config`."""
  save_figure(draw_learning_rate(records, config), path)


def draw_learning_rate(records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> "Figure":
  """Draws the learning rate over the run of `config`; see `get_learning_rates`."""
  figure = create_figure(4.5, 3.5)
  axis = figure.subplots()
  axis.plot(*get_learning_rates(records, config))
  finish_axis(axis, "learning rate")
  return figure


def get_learning_rates(
  records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
  """The curve of the learning rate: epochs done and rates, both float64 (points,).

  It has a point for each step, or RATE_POINTS of them, where the schedule of `config` gives the
  recorded rates. Otherwise it has these, of the last step of each epoch: the schedule knows neither
  what a plateau lowered nor that the run was shorter before it was extended.
  """
  epochs, ends, recorded = (
    np.array([record[key] for record in records], np.float64)
    for key in ("epoch", "step", "learning_rate")
  )
  if config["schedule"]["name"] not in optim.SCHEDULES:  # the user's own, not entered here
    return epochs, recorded
  steps = np.unique(np.linspace(1, ends[-1], RATE_POINTS, dtype=int))
  steps_per_epoch = int(ends[0] // epochs[0])
  expected, rates = (compute_rates(config, done - 1, steps_per_epoch) for done in (ends, steps))
  least = 1e-4 * config["optimizer"]["learning_rate"]  # smaller differences are invisible
  if not np.allclose(recorded, expected, rtol=1e-4, atol=least):
    return epochs, recorded
  return steps / steps_per_epoch, rates


def compute_rates(config: Mapping[str, Any], steps: np.ndarray, steps_per_epoch: int) -> np.ndarray:
  """The rates of `steps` (N,), counted from 0, by the schedule of `config`: float64 (N,)."""
  schedule = optim.create_schedule(
    steps_per_epoch=steps_per_epoch, total_epochs=config["total_epochs"], **config["schedule"]
  )
  factors = jax.vmap(schedule)(np.asarray(steps, np.int32))
  return config["optimizer"]["learning_rate"] * np.asarray(factors, np.float64)


@warn_on_failure
def save_range_test(
  path: pathlib.Path,
  rates: np.ndarray,
  losses: np.ndarray,
  smoothed: np.ndarray,
  suggestion: float,
) -> None:
  """Writes the loss of each step against its learning rate, with the `suggestion` marked."""
  figure = create_figure(6, 4)
  axis = figure.subplots()
  axis.plot(rates, losses, color="lightgray", label="loss of the batch")
  axis.plot(rates, smoothed, label="moving average")
  axis.axvline(suggestion, color="black", linestyle="--", label=f"suggestion {suggestion:.2g}")
  top = 1.2 * max(smoothed[0], smoothed.min())
  axis.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)", ylim=(0, top))
  axis.grid(alpha=0.3)
  axis.legend()
  save_figure(figure, path)


def draw_calibration(bins: metrics.CalibrationBins) -> "Figure":
  """Draws the accuracy of the examples of each confidence, beside that of perfect calibration."""
  figure = create_figure(4.5, 3.5)
  axis = figure.subplots()
  edges = np.linspace(0, 1, len(bins.examples) + 1)
  shown = bins.examples > 0
  width = 100 / len(bins.examples)
  axis.bar(100 * edges[:-1][shown], 100 * bins.accuracy[shown], width, align="edge", ec="white")
  axis.plot([0, 100], [0, 100], color="black", linestyle="--", label="perfect calibration")
  axis.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
  axis.grid(alpha=0.3)
  axis.legend(loc="upper left")
  return figure


def create_figure(width: float, height: float) -> "Figure":
  """An empty figure of this size in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: pathlib.Path) -> None:
  """Writes a PNG, whole or not at all."""
  with files.replace(path) as part:
    figure.savefig(part, dpi=DPI, format="png")


def format_svg(figure: "Figure") -> str:
  """The figure as an SVG document, the same bytes for the same figure."""
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "flax_cifar", "svg.fonttype": "none"}):
    figure.savefig(text, format="svg", metadata={"Date": None})
  return text.getvalue()


def finish_axis(axis: "Axes", label: str) -> None:
  """Labels an axis over epochs, with a legend if any curve has a label."""
  from matplotlib.ticker import MaxNLocator

  axis.set_xlabel("epoch")
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  axis.set_ylabel(label)
  axis.grid(alpha=0.3)
  if axis.get_legend_handles_labels()[0]:
    for text in axis.legend().get_texts():
      text.set_parse_math(False)  # a run may be called $x$
