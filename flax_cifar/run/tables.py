"""Tables as aligned text and as Markdown, and samples as mean ± standard deviation."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar.models import layer_table

PEEKED = " (on the test split)"  # after a validation accuracy of the protocol `published`


def format_text(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
  """Aligned lines, a row each.

  Args:
    rows: the cells, with the header first.
    numeric: for each column, whether it stands to the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = zip(row, widths, numeric, strict=True)
    padded = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells]
    lines.append("  ".join(padded).rstrip())
  return lines


def format_markdown(
  header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] = ()
) -> str:
  """A table in Markdown; `numeric` as in `format_text`, none by default.

  >>> print(format_markdown(["norm", "test"], [["batch", "86.21"]], [False, True]), end="")
  | norm | test |
  | --- | ---: |
  | batch | 86.21 |
  """
  rules = ["---:" if right else "---" for right in numeric or [False] * len(header)]
  return "".join(f"| {' | '.join(line)} |\n" for line in [header, rules, *rows])


def format_sample(sample: Mapping[str, Any], spec: str, *, scale: float = 1.0) -> str:
  """Mean ± standard deviation and number of a sample, see `metrics.describe_sample`.

  >>> format_sample({"mean": 0.841, "sd": 0.002, "n": 3}, ".2%")
  '84.10% ± 0.20% (n = 3)'
  """
  spread = "" if sample["sd"] is None else f" ± {format(scale * sample['sd'], spec)}"
  return f"{format(scale * sample['mean'], spec)}{spread} (n = {sample['n']})"


def format_percent(sample: Mapping[str, Any] | None) -> str:
  """A sample of fractions in percent, without the sign; "–" for no sample.

  >>> format_percent({"mean": 0.841, "sd": None, "n": 1})
  '84.10 (n = 1)'
  """
  return "–" if sample is None else format_sample(sample, ".2f", scale=100)


def format_layer_table(rows: Sequence[layer_table.Row]) -> str:
  """The layers of a network as aligned text, with a line of totals."""
  header = ("layer", "operation", "output", "parameters", "multiply-adds", "field", "jump")
  sums = layer_table.summarize(rows)
  numbers = f"{sums['parameters']:,}", f"{sums['multiply_adds']:,}"
  total = ("total", "", "", *numbers, format_field(sums["receptive_field"]), "")
  cells = [header, *map(_format_layer, rows), total]
  lines = format_text(cells, [False] * 3 + [True] * 4)
  rule = "-" * max(map(len, lines))
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]]) + "\n"


def _format_layer(row: layer_table.Row) -> tuple[str, ...]:
  return (
    row.name,
    row.kind,
    "x".join(map(str, row.output_shape)),
    f"{row.parameters:,}",
    f"{row.multiply_adds:,}",
    format_field(row.receptive_field.size if row.receptive_field else None),
    format_field(row.receptive_field.jump) if row.receptive_field else "",
  )


def format_field(size: tuple[int, int] | None) -> str:
  """A receptive field, (height, width) in pixels; "all" for None, which is the whole image.

  >>> format_field((7, 7)), format_field((7, 5)), format_field(None)
  ('7', '7x5', 'all')
  """
  if size is None:
    return "all"
  return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
