"""Puts a finished run on the Hugging Face Hub, with a card; others then name it hf:USER/NAME.

  python -m flax_cifar.tools.publish runs/NAME --to=USER/NAME
  python -m flax_cifar.tools.publish runs/NAME --out=FOLDER
  python -m flax_cifar.tools.evaluate --model=hf:USER/NAME

--out writes the files to a new folder, and uploads nothing. The package huggingface_hub uploads;
log in with `hf auth login` before. The card names no license: add that of your weights.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar import errors, files
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
| training | {epochs} epochs in {minutes:,.1f} minutes on {hardware} |
| command | `{command}` |
| commit | `{commit}` |

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
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  return create_parser().parse_args(arguments)


def publish(options: argparse.Namespace) -> str:
  """Writes or uploads the files, and returns where they are.

  Raises:
    UserError: there is no finished run, --out exists, or the upload fails.
  """
  run = errors.get_path("RUN", options.run)
  if options.out:
    folder = errors.get_path("--out", options.out)
    errors.require(not folder.exists(), "--out", options.out, "a folder that does not exist yet")
    write_files(run, folder, repo="USER/NAME")
    return str(folder)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "files"
    write_files(run, folder, repo=options.to)
    return hub.upload(folder, options.to, private=options.private)


def write_files(run: pathlib.Path, folder: pathlib.Path, *, repo: str) -> None:
  """Writes the files of `run` for the repository `repo`, with their card, to the new `folder`."""
  from flax_cifar.run import finished
  from flax_cifar.run import weights as weights_lib

  found = finished.read_run(run)
  weights_lib.load_weights(run / hub.WEIGHTS)  # whole and of this program
  if missing := [name for name in FILES if not (run / name).is_file()]:
    raise errors.UserError(f"{str(run)!r} lacks {', '.join(missing)}; restore them first.")
  try:
    folder.mkdir(parents=True)
    for name in FILES:
      shutil.copyfile(run / name, folder / name)
    files.write_text(folder / "README.md", format_card(found.result, repo))
  except OSError as error:
    shutil.rmtree(folder, ignore_errors=True)  # half of it is of no use
    raise errors.UserError(
      f"{str(folder)!r} cannot be written: {error}; choose another."
    ) from error


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
    accuracy=result_lib.format_score(result, "accuracy", ".2%"),
    minutes=result["train_seconds"] / 60,
    **{key: result[key] for key in ("parameters", "protocol", "scored_weights", "seed", "epochs")},
    **{key: result[key] for key in ("hardware", "command", "commit")},
  )


if __name__ == "__main__":
  main()
