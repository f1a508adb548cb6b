"""Puts a finished run on the Hugging Face Hub, with a card; others then name it hf:USER/NAME.

  python -m flax_cifar.tools.publish runs/NAME --to=USER/NAME
  python -m flax_cifar.tools.publish runs/NAME --out=FOLDER
  python -m flax_cifar.tools.evaluate --model=hf:USER/NAME

--out writes the files to a new folder, and uploads nothing. The package huggingface_hub uploads;
log in with `hf auth login` before. The card names no license: add that of your weights. The folder
of the run is left out of its command; a run that names another absolute path, as that of its data,
is refused without --force.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar import environment, errors, files
from flax_cifar.tools import command_line
from flax_cifar.zoo import hub

FILES = (hub.WEIGHTS, "result.json", "summary.txt", "metrics.jsonl")
CARD = """\
---
library_name: flax
tags: [image-classification, jax, flax, flax_cifar, {network}]
{data_tag}---

# {name}

An image classifier trained with flax_cifar.

| | |
| --- | --- |
| network | `{network}`, {norm} norm, {parameters:,} parameters; summary.txt has its layers |
| data | `{data}`; images of {size} x {size} pixels |
| {split} accuracy | {accuracy} |
| protocol | {protocol} |
| weights | {scored_weights}, seed {seed} |
| training | {epochs} epochs{extended} in {minutes:,.1f} minutes on {hardware} |
| command | `{command}` |
| commit | {commits} |

    import flax_cifar
    network = flax_cifar.load_pretrained("hf:{repo}")
    probabilities = network.predict(images)  # uint8 (N, {size}, {size}, 3), RGB
"""


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    print(publish(options))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("publish", __doc__)
  parser.add_argument("run", help="the folder of a finished run")
  target = parser.add_mutually_exclusive_group(required=True)
  target.add_argument("--to", default="", metavar="USER/NAME", help="the repository")
  target.add_argument("--out", default="", help="a new folder for the files, in place of it")
  parser.add_argument("--private", action="store_true", help="create a private repository")
  parser.add_argument("--force", action="store_true", help="show absolute paths of this machine")
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  if options.out and options.private:
    raise errors.UserError("--private is for --to=USER/NAME; --out uploads nothing: leave it out.")
  if not options.out:
    hub.check_repository(options.to, "--to", options.to)
  return options


def publish(options: argparse.Namespace) -> str:
  """Writes or uploads the files, and returns where they are.

  Raises:
    UserError: there is no finished run, or it names an absolute path; --out exists, or the upload
      fails.
  """
  run = errors.get_path("RUN", options.run)
  if options.out:
    folder = errors.get_path("--out", options.out)
    errors.require(not folder.exists(), "--out", options.out, "a folder that does not exist yet")
    write_files(run, folder, repo="USER/NAME", force=options.force)
    return str(folder)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "files"
    write_files(run, folder, repo=options.to, force=options.force)
    return hub.upload(folder, options.to, private=options.private)


def write_files(run: pathlib.Path, folder: pathlib.Path, *, repo: str, force: bool) -> None:
  """Writes the files of `run` for the repository `repo`, with their card, to the new `folder`.

  Raises:
    UserError: there is no finished run, its weights are damaged or of another one, or it names an
      absolute path without `force`; or the folder cannot be written.
  """
  from flax_cifar.run import finished
  from flax_cifar.run import result as result_lib

  found = finished.read_run(run)
  result = {**found.result, "command": result_lib.drop_workdir(found.result["command"])}
  if not force:
    check_paths(run, result)
  finished.load_weights(run, found.result)  # whole, and of this run
  if missing := [name for name in FILES if not (run / name).is_file()]:
    raise errors.UserError(f"{str(run)!r} lacks {', '.join(missing)}; restore them first.")
  try:
    folder.mkdir(parents=True)
  except OSError as error:
    raise errors.UserError(f"{str(folder)!r} cannot be made: {error}; choose another.") from error
  try:
    for name in FILES:
      shutil.copyfile(run / name, folder / name)
    files.write_json(folder / "result.json", result)
    files.write_text(folder / "README.md", format_card(result, repo))
  except OSError as error:
    shutil.rmtree(folder, ignore_errors=True)  # half of it is of no use
    raise errors.UserError(
      f"{str(folder)!r} cannot be written: {error}; choose another."
    ) from error


def check_paths(run: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Raises a UserError where a text of the result names an absolute path."""
  from flax_cifar.run import result as result_lib

  for key, text in result_lib.list_paths(result):
    raise errors.UserError(
      f"{key}={text!r} of {str(run)!r} shows a path of this machine; train with a relative one, "
      "or publish it as it is with --force."
    )


def format_accuracy(result: Mapping[str, Any]) -> str:
  """The accuracy of the first seed, whose weights are in the file, and that of all seeds."""
  from flax_cifar import metrics
  from flax_cifar.run import result as result_lib

  every = result_lib.format_score(result, "accuracy", ".2%")
  if result["num_seeds"] == 1:
    return every
  name = f"{result_lib.get_final_split_name(result)}_accuracy"
  first = metrics.get_per_seed(result, name)[0]
  return f"{first:.2%}; of all seeds {every}"


def format_extended(result: Mapping[str, Any]) -> str:
  """The lengths under which a run was trained before it was extended."""
  earlier = result.get("earlier_total_epochs")
  return f", extended from {errors.list_some(earlier)}," if earlier else ""


def format_card(result: Mapping[str, Any], repo: str) -> str:
  """The card of a run for the repository `repo`."""
  from flax_cifar.run import result as result_lib

  config = result["config"]
  split, data = result_lib.get_final_split_name(result), config["data"]["name"]
  return CARD.format(
    name=config["name"],
    repo=repo,
    network=config["model"]["name"],
    norm=config["model"]["norm"],
    data=data,
    data_tag=f"datasets: [{data}]\n" if data == "cifar10" else "",
    size=config["data"]["image_size"],
    split=split,
    accuracy=format_accuracy(result),
    minutes=result["train_seconds"] / 60,
    extended=format_extended(result),
    commits=", ".join(f"`{commit}`" for commit in result_lib.list_commits(result)),
    **{key: result[key] for key in ("parameters", "protocol", "scored_weights", "seed", "epochs")},
    **{key: result[key] for key in ("hardware", "command")},
  )


if __name__ == "__main__":
  environment.apply_settings()
  main()
