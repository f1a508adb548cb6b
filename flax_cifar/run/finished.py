"""A finished run: what result.json, metrics.jsonl and weights.safetensors of its folder hold."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar import errors, zoo
from flax_cifar.run import config as config_lib
from flax_cifar.run import weights as weights_lib
from flax_cifar.run import workdir as workdir_lib

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that has come to its end.

  Attributes:
    result: the content of result.json.
    records: of the epochs, the lines of metrics.jsonl; a loss that was not finite is None.
  """

  result: Record
  records: Sequence[Record]


def read_run(workdir: pathlib.Path) -> Run:
  """Reads the files of a finished run.

  Raises:
    UserError: its folder holds no result, or no records; or the run has gone on since its result.
  """
  result = workdir_lib.read_result(workdir)
  if result is None:
    raise errors.UserError(
      f"{str(workdir)!r} holds no finished run: it has no result.json, which a run writes at its "
      "end; name another folder, or finish this run by the command that began it."
    )
  records = _read_records(workdir / "metrics.jsonl")
  epochs = [record.get("epoch") for record in records]
  if epochs != list(range(1, len(epochs) + 1)) or len(epochs) != result.get("epochs"):
    raise errors.UserError(
      f"{str(workdir)!r} holds no finished run: result.json is of {result.get('epochs')} epochs "
      f"and metrics.jsonl of {len(records)}; finish it by the command with more epochs."
    )
  return Run(result, records)


def load_weights(workdir: pathlib.Path, result: Record) -> weights_lib.Weights:
  """The network of the finished run in `workdir`, whose result.json holds `result`.

  Raises:
    UserError: its weights are missing or damaged, or those of another run.
  """
  path = workdir / zoo.WEIGHTS
  weights = weights_lib.load_weights(path)
  differences = errors.list_differences(
    config_lib.flatten(weights.config),
    config_lib.flatten(config_lib.complete(result["config"])),
    places=("there", "in result.json"),
  )
  if differences:
    raise errors.UserError(
      f"{str(path)!r} is of another run: {errors.list_some(differences, 3)}; restore this run's."
    )
  return weights


def _read_records(path: pathlib.Path) -> list[Record]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [dict(json.loads(line)) for line in lines]
  except PermissionError as error:
    raise errors.UserError(f"{str(path)!r} cannot be read; make it readable.") from error
  except (OSError, ValueError, TypeError) as error:
    raise errors.UserError(
      f"{str(path)!r} cannot be read ({errors.shorten(error)}); delete result.json beside it, "
      "and the same command writes both again from the last checkpoint."
    ) from error
