"""The report of a run: its numbers, its pictures, and how a browser shows it."""

import html.parser
import json
import os
import re
import shutil
import sys

import flax.linen as nn
import numpy as np
import pytest

from flax_cifar import errors, models
from flax_cifar.models import blocks
from flax_cifar.run import classifier, weights
from flax_cifar.tools import report
from tests import runs, tiny

NAMES = ("<script>alert(1)</script>", "b & b", 'c"')


class Page(html.parser.HTMLParser):
  """The tables, images and links of a page."""

  def __init__(self, text):
    super().__init__()
    self.images, self.links, self.targets, self.tags = [], [], set(), set()
    self.tables, self.cell = [], None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.add(tag)
    self.targets.add(attrs.get("id"))
    if tag == "img":
      self.images.append(attrs)
    elif tag == "a":
      self.links.append(attrs["href"])
    elif tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.cell = ""

  def handle_data(self, data):
    if self.cell is not None:
      self.cell += data

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self.tables[-1][-1].append(self.cell.strip())
      self.cell = None


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _registered):
  """A finished run on images whose classes have awkward names."""
  folder = tmp_path_factory.mktemp("report")
  arrays = dict(np.load(tiny.write_data(folder / "plain.npz").removeprefix("npz:")))
  np.savez(folder / "data.npz", **arrays, class_names=np.array(NAMES))
  runs.run(folder / "run", f"npz:{folder / 'data.npz'}", **{"log.pictures": True, "name": "s9-x"})
  return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def _registered():
  with tiny.registered():
    yield


@pytest.fixture(scope="module")
def text(finished):
  return report.create_page(report.parse([str(finished)]))


def test_the_confusion_matrix_and_the_accuracies_are_those_of_the_predictions(finished, text):
  content = weights.load_weights(finished / "weights.safetensors")
  network = classifier.create_classifier(content, dtype="float32")
  arrays = np.load(finished.parent / "data.npz")
  predicted = network.predict(arrays["test_images"]).argmax(-1)
  labels = arrays["test_labels"]
  expected = [[str(((labels == a) & (predicted == b)).sum()) for b in range(3)] for a in range(3)]
  scores, matrix, *_ = Page(text).tables
  assert [row[1:] for row in matrix[1:]] == expected
  assert [row[0] for row in matrix[1:]] == list(NAMES)
  for label, row in enumerate(scores[1:]):
    share = (predicted[labels == label] == label).mean()
    assert row == [NAMES[label], str((labels == label).sum()), f"{100 * share:.1f} %"]
  result = json.loads((finished / "result.json").read_text())
  assert f"{result['test_accuracy']:.2%}" in text
  assert result["command"].split()[0] in text


def test_the_page_is_whole_and_harmless(text):
  page = Page(text)
  assert "script" not in page.tags
  assert not re.search(r"(src|href)=.?https?:", text)
  assert all(one["src"].startswith("data:image/") and len(one["alt"]) > 10 for one in page.images)
  assert len(page.images) >= 5
  assert {link.removeprefix("#") for link in page.links} <= page.targets
  assert "niharikavadapalli/ERA-V1" not in text  # its name is s9-x, its network that of no config


def test_a_page_has_the_text_of_the_config_whose_network_it_is(finished, monkeypatch):
  assert "niharikavadapalli/ERA-V1" in report.describe_config(get_named("s9-x", "dilated"))
  for name, network in (
    ("s9-mine", "five_convs"),
    ("common", "s9"),
    ("../s9", "dilated"),
    ("", "s9"),
  ):
    assert report.describe_config(get_named(name, network)) == ""
  monkeypatch.setattr(report, "describe_config", lambda config: f"<b>{config['name']}")
  assert "&lt;b&gt;s9-x</pre>" in report.create_page(report.parse([str(finished)]))


def get_named(name, network):
  """What a page reads in the config of a run."""
  return {"name": name, "model": {"name": network}}


class Squeezing(tiny.TinyNet):
  """All positions of its last feature map see the whole image."""

  @nn.compact
  def __call__(self, images, train):
    arguments = (6, self.norm, self.kernel_init, 0.0, self.dtype)
    x = blocks.ConvUnit(*arguments, name="unit")(images, train)
    squeeze_excite = blocks.SqueezeExcite(2, self.kernel_init, name="squeeze_excite")
    x = x * squeeze_excite(blocks.GlobalAveragePool()(x))
    x = blocks.ConvUnit(*arguments, name="last")(x, train)
    return blocks.ConvHead(self.num_classes, self.kernel_init, name="head")(x)


def test_a_network_with_squeeze_excite_sees_the_whole_image(tmp_path, data, monkeypatch):
  monkeypatch.setitem(models.MODELS, "tiny", Squeezing)
  runs.run(tmp_path / "run", data, total_epochs=1)
  text = report.create_page(report.parse([str(tmp_path / "run")]))
  assert "<dt>receptive field</dt><dd>the whole image</dd>" in text
  assert "it sees the whole image;" in text
  (layers,) = (table for table in Page(text).tables if table[0][0] == "layer")
  fields = {row[0]: row[-1] for row in layers[1:]}
  assert fields["unit/conv"] == "3"
  assert fields["last/conv"] == "all"


def test_a_receptive_field_is_shown_in_pixels(text):
  assert "<dt>receptive field</dt><dd>3 pixels</dd>" in text
  assert "it can see the red frame, 3 pixels;" in text


def test_mistakes_come_with_the_most_confident_first(text):
  shares = [float(x) for x in re.findall(r"<figcaption>.* / .*, ([\d.]+) %", text)]
  assert shares == sorted(shares, reverse=True)


def test_several_folders_are_compared(finished, tmp_path):
  data = f"npz:{finished.parent / 'data.npz'}"
  runs.run(tmp_path / "slow", data, **{"optimizer.learning_rate": 0.001})
  options = report.parse([str(finished), str(tmp_path / "slow")])
  assert options.out.name == "comparison.html"
  scores, cost, varied = Page(report.create_page(options)).tables
  assert [row[0] for row in scores[1:]] == [row[0] for row in cost[1:]] == ["run", "slow"]
  result = json.loads((tmp_path / "slow" / "result.json").read_text())
  assert cost[2][1] == f"{result['parameters']:,}"
  assert cost[2][3:] == [result["protocol"], result["hardware"]]
  assert [row[0] for row in varied[1:]] == ["optimizer.learning_rate"]
  assert varied[1][2] == "0.001"


def write_sweep(folder):
  """The finished runs of a sweep over norm and seed, without their training."""
  accuracies = {("batch", 0): 0.8, ("batch", 1): 0.9, ("layer", 0): 0.5, ("layer", 1): 0.7}
  for (norm, seed), accuracy in accuracies.items():
    config = tiny.get_config("shapes", seed=seed, **{"model.norm": norm}).to_dict()
    facts = {"parameters": 12, "protocol": "honest", "train_seconds": 3.0, "hardware": "a CPU"}
    result = {"test_accuracy": accuracy, "epochs": 1, "seed": seed, "config": config, **facts}
    record = {"epoch": 1, "train_accuracy": 0.9, "validation_accuracy": accuracy}
    path = folder / f"norm={norm},seed={seed}"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def read_rows(*folders):
  """(name, accuracy on the test split) of each row of the comparison of `folders`."""
  rows, *_ = Page(report.create_page(report.parse([str(folder) for folder in folders]))).tables
  place = rows[0].index("test")
  return [(row[0], row[place]) for row in rows[1:]]


def test_the_runs_of_a_sweep_are_compared_by_what_they_share(tmp_path):
  write_sweep(tmp_path / "sweep")
  batch, layer = "85.00 ± 7.07 (n = 2)", "60.00 ± 14.14 (n = 2)"
  expected = [("norm=batch", batch), ("norm=layer", layer)]
  assert read_rows(tmp_path / "sweep") == expected
  assert read_rows(*(tmp_path / "sweep" / name for name, _ in expected)) == expected
  assert read_rows(tmp_path / "sweep" / "norm=layer") == expected[1:]
  write_sweep(tmp_path / "more")
  again = [(f"more/{name}", score) for name, score in expected]
  assert read_rows(tmp_path / "sweep", tmp_path / "more") == expected + again


def test_validation_on_the_test_split_is_marked_in_its_own_cells(tmp_path):
  write_sweep(tmp_path / "sweep")
  for seed in (0, 1):
    path = tmp_path / "sweep" / f"norm=layer,seed={seed}" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": "published"}))
  rows, *_ = Page(report.create_page(report.parse([str(tmp_path / "sweep")]))).tables
  (_, *header), (_, *batch), (_, *layer) = rows
  marked = [name for name, cell in zip(header, layer, strict=True) if "(on the test split)" in cell]
  assert marked == ["validation", "best validation"]
  assert not any("test split" in cell for cell in batch)


def test_the_page_lies_in_the_folder_that_it_is_about(finished, tmp_path):
  write_sweep(tmp_path / "sweep")
  assert report.parse([str(finished)]).out == finished / "report.html"
  assert report.parse([str(tmp_path / "sweep")]).out == tmp_path / "sweep" / "comparison.html"
  names = [str(tmp_path / "sweep" / f"norm={name}") for name in ("batch", "layer")]
  assert str(report.parse(names[:1]).out) == str(report.parse(names).out) == "comparison.html"
  with pytest.raises(errors.UserError, match="no finished run with the settings 'norm=group'"):
    report.create_page(report.parse([str(tmp_path / "sweep" / "norm=group")]))


def test_a_frame_is_drawn_around_the_middle():
  image = np.zeros((4, 4, 3), np.uint8)
  inside, outside = report.frame(image, (2, 2)), report.frame(image, (8, 8))
  assert inside.shape == (6, 6, 3)
  assert (inside[1, 1:5] == (200, 30, 30)).all()
  assert outside.shape == (10, 10, 3)
  assert (outside[0] == (200, 30, 30)).all()
  assert not outside[3:7, 3:7].any()


def test_the_program_writes_the_page_or_one_line(finished, monkeypatch, capsys, tmp_path):
  out = tmp_path / "new" / "page.html"
  monkeypatch.setattr(sys, "argv", ["report", str(finished), f"--out={out}"])
  with pytest.raises(SystemExit):
    report.main()
  assert capsys.readouterr().err.startswith(f"error: --out={str(out)!r} is not valid")
  out.parent.mkdir()
  report.main()
  assert capsys.readouterr().out == f"report    {out}\n"
  with pytest.raises(errors.UserError, match="holds no finished run"):
    report.create_page(report.parse([str(tmp_path)]))
  with pytest.raises(
    errors.UserError, match=r"FOLDER='.*result\.json' .* a folder, and not a file"
  ):
    report.parse([str(finished / "result.json")])


def test_a_page_may_name_a_path_that_is_no_utf8(tmp_path):
  report.write(tmp_path / "page.html", os.fsdecode(b"gr\xfc\xdfe"))
  assert (tmp_path / "page.html").read_text() == "gr??e"


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_browser_shows_it_without_errors_at_every_width(text, tmp_path, width):
  webdriver = pytest.importorskip("selenium.webdriver")
  driver_path = shutil.which("chromedriver")
  if not driver_path:
    pytest.skip("chromedriver is not installed")
  (tmp_path / "page.html").write_text(text, encoding="utf-8")
  options = webdriver.ChromeOptions()
  for argument in ("--headless=new", "--no-sandbox", f"--window-size={width},900"):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.ChromeService(driver_path)
  with webdriver.Chrome(options=options, service=service) as browser:
    browser.set_window_size(width, 900)
    browser.get((tmp_path / "page.html").as_uri())
    assert not browser.get_log("browser")
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0
