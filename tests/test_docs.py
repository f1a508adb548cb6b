"""Everything that README.md, docs/ and the headers of configs/ name exists."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import re
import subprocess
import textwrap
from collections.abc import Iterator

import pytest
import yaml

from flax_cifar.configs import common

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("benchmarks", "configs", "flax_cifar", "tests")
FOLDERS = tuple(f"{name}/" for name in (*PACKAGES, "docs"))
NOT_OURS = {"ipykernel", "pip", "pytest", "venv"}  # modules of `python -m`
PLACEHOLDER = re.compile(r"\b(NAME|KEY|FILE|PART)\b")

PAGES = {
  path.relative_to(ROOT).as_posix(): path
  for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
HEADERS = {
  f"configs/{path.name}": f"flax_cifar.configs.{path.stem}"
  for path in ROOT.glob("configs/*.py")
  if path.stem != "__init__"
}
SHARED = {"common", "recipes", "variants"}  # files of configs/ that are not configs
SYSTEMS = [pathlib.Path(name).stem for name in HEADERS if pathlib.Path(name).stem not in SHARED]
ALL = [*PAGES, *HEADERS]


def read(name: str) -> str:
  """The text of a page without its fenced code, or the docstring of a config file."""
  if name in HEADERS:
    return importlib.import_module(HEADERS[name]).__doc__ or ""
  return re.sub(r"^```.*?^```", "", PAGES[name].read_text(), flags=re.DOTALL | re.MULTILINE)


def find_words(text: str) -> Iterator[str]:
  """The words of inline code and of indented commands, without placeholders such as NAME."""
  for code in re.findall(r"`([^`]+)`", text) + re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
    for word in code.split():
      if not PLACEHOLDER.search(word):
        yield word.rstrip(".,;")


def find_tests(text: str) -> Iterator[tuple[str, str]]:
  """(file, test or "") of each test that `text` names; `::test` belongs to the file before it."""
  file = ""
  for match in re.finditer(r"([\w./]*\btest_\w+\.py)?(?:::(test_\w+))?", text):
    file = (match[1] or file).removeprefix("../")
    if match[0]:
      yield file, match[2] or ""


def find_paths(text: str) -> Iterator[str]:
  """Paths of this repository: below one of FOLDERS, or the end of the path of a module."""
  for word in find_words(text):
    path = word.split("=")[-1].split(":")[0]
    if re.fullmatch(r"[\w./-]+", path) and (path.startswith(FOLDERS) or path.endswith(".py")):
      yield path


def find_dotted_names(text: str) -> Iterator[str]:
  """Modules of this repository, and names in them, such as flax_cifar.state.all_finite."""
  for word in find_words(text):
    if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", word) and not word.endswith(".py"):
      yield word


def find_variants(text: str) -> Iterator[tuple[str, str]]:
  """(config, variant) of each --config=configs/NAME.py:VARIANT, and of each `NAME:VARIANT`."""
  long = re.findall(r"--config[= ]configs/(\w+)\.py(?::([\w=,.]+))?", text)
  short = re.findall(rf"\b({'|'.join(SYSTEMS)})(?:\.py)?:(\w[\w=,.]*)", text)
  for name, variant in [*long, *short]:
    if not PLACEHOLDER.search(f"{name} {variant}"):
      yield name, variant.rstrip(".,")


def exists(path: str) -> bool:
  if path.startswith(FOLDERS) or (ROOT / path).exists():
    return (ROOT / path).exists()
  return any(any(ROOT.glob(f"{name}/**/{path}")) for name in PACKAGES)


def find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
  try:
    return importlib.util.find_spec(module)
  except ModuleNotFoundError:  # its parent is not a package
    return None


def has_dotted_name(dotted: str) -> bool:
  if find_spec(dotted):
    return True
  module, _, attribute = dotted.rpartition(".")
  return bool(find_spec(module)) and hasattr(importlib.import_module(module), attribute)


def get_anchors(page: pathlib.Path) -> set[str]:
  """The anchors that GitHub gives to the headings of `page`."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_named_tests_exist(name):
  for file, test in find_tests(read(name)):
    files = [ROOT / file] if "/" in file else list(ROOT.glob(f"tests/**/{file}"))
    texts = [path.read_text() for path in files if path.is_file()]
    assert texts, f"there is no {file}"
    assert not test or any(f"\ndef {test}(" in text for text in texts), f"no {test} in {file}"


@pytest.mark.parametrize("name", ALL)
def test_named_paths_exist(name):
  text = read(name)
  if name in HEADERS:  # plain text
    paths = re.findall(rf"\b(?:{'|'.join(FOLDERS)})[\w./-]*\w", text)
    paths = [path for path in paths if not PLACEHOLDER.search(path)]
  else:
    paths = list(find_paths(text))
  assert not [path for path in paths if not exists(path)]


@pytest.mark.parametrize("name", PAGES)
def test_links_have_targets(name):
  for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
    path, _, anchor = link.partition("#")
    target = PAGES[name].parent / path if path else PAGES[name]
    assert "://" in link or target.exists(), link
    assert not anchor or anchor in get_anchors(target), f"{link}: there is no such heading"


def test_every_network_has_a_section_of_facts_and_layers():
  text = PAGES["docs/networks.md"].read_text()
  for system in set(SYSTEMS) - {"quickstart"}:  # which trains `pyramid`
    assert f"{{network}} {system}\n" in text
    assert f"{{layers}} {system}\n" in text


@pytest.mark.parametrize("name", ALL)
def test_named_modules_can_be_found(name):
  for module in re.findall(r"\bpython3? -m\s+([\w.]*\w)", read(name)):
    parent = module.split(".")[0]
    assert parent in (*PACKAGES, *NOT_OURS), f"{module} is not of this repository"
    assert parent in NOT_OURS or find_spec(module.removesuffix(".NAME")), f"there is no {module}"


@pytest.mark.parametrize("name", PAGES)
def test_dotted_names_exist(name):
  assert not [dotted for dotted in find_dotted_names(read(name)) if not has_dotted_name(dotted)]


@pytest.mark.parametrize("name", ALL)
def test_named_configs_load(name):
  for system, variant in find_variants(read(name)):
    config = importlib.import_module(f"flax_cifar.configs.{system}").get_config(variant)
    assert config.name.startswith(system)


@pytest.mark.parametrize("name", ALL)
def test_named_keys_exist(name):
  for key in re.findall(r"--config\.([\w.]*\w)", read(name)):
    value = common.get_config().to_dict()
    for part in [] if PLACEHOLDER.search(key) else key.split("."):
      assert part in value, f"there is no key {key}"
      value = value[part]


def test_the_readme_has_one_command_where_the_checks_look_for_it():
  section = PAGES["README.md"].read_text().split("### Run the tests")[1]
  assert "\n### " in section  # the checks read from one heading to the next
  commands = re.findall(r"^    (python3 .*)$", section.split("\n### ")[0], flags=re.MULTILINE)
  assert [command.endswith("-m pytest -n 2") for command in commands] == [True]


@pytest.mark.parametrize(
  "test", ["tests/test_train.py::test_nothing", "tests/nothing/test_nothing.py", "test_nothing.py"]
)
def test_a_missing_test_is_found(test, tmp_path, monkeypatch):
  page = tmp_path / "page.md"
  page.write_text(f"`{test}`")
  monkeypatch.setitem(PAGES, "page.md", page)
  with pytest.raises(AssertionError, match="no test"):
    test_named_tests_exist("page.md")


@pytest.mark.parametrize("path", ["flax_cifar/nothing.py", "kernels/nothing.py", "docs/nothing/"])
def test_a_missing_path_is_found(path):
  assert [path for path in find_paths(f"`{path}`") if not exists(path)] == [path]


@pytest.mark.parametrize("dotted", ["benchmarks.nothing", "flax_cifar.train.nothing"])
def test_a_missing_name_is_found(dotted):
  assert list(find_dotted_names(f"`python -m {dotted} --repeats 5`")) == [dotted]
  assert not has_dotted_name(dotted)


def find_recipes() -> list[str]:
  """The indented blocks of docs/clusters.md under "Launch recipes"."""
  text = (ROOT / "docs" / "clusters.md").read_text().split("## Launch recipes")[1]
  blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
  return [textwrap.dedent(block).strip() for block in blocks]


def test_launch_recipes_are_well_formed():
  """Shell scripts parse, and manifests are YAML; nothing more can be checked without a cluster."""
  recipes = find_recipes()
  manifests = [text for text in recipes if text.startswith(("apiVersion:", "num_nodes:"))]
  scripts = [text for text in recipes if text not in manifests]
  assert (len(scripts), len(manifests)) == (4, 2)
  for script in scripts:
    ended = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
  jobset, skypilot = map(yaml.safe_load, manifests)
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"]
  assert "$SKYPILOT_NODE_RANK" in skypilot["run"]
