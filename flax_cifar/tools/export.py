"""Exports a trained network as a program that needs JAX alone: bytes in, probabilities out.

  python -m flax_cifar.tools.export --model=tiny50k --out=tiny50k.stablehlo

The file is StableHLO with the weights in it, for any number of images: uint8 (N, H, W, 3) ->
float32 (N, classes). `jax.export` reads it on the platforms of --platforms, by JAX of this version
or one of the six months after it. A small program beside it, tiny50k.stablehlo.py, has the class
names and shows how to call it: python tiny50k.stablehlo.py PICTURE
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax_cifar import environment, errors, files, zoo
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  import flax.linen as nn

  from flax_cifar.run import weights as weights_lib

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
EXAMPLE = '''"""Classifies a picture with the network beside this file, exported by JAX {version}.

  python FILE.py PICTURE

Without a picture it classifies a black image. It needs flatbuffers, Pillow for a picture, and JAX
of that version or one released in the six months after it. It runs on {platforms}.
"""

import pathlib
import sys

import jax.export
import numpy as np

CLASSES = {classes}
HEIGHT, WIDTH = {height}, {width}


def read(path):
  """The picture as uint8 (HEIGHT, WIDTH, 3): upright, white where it is transparent."""
  from PIL import Image, ImageOps

  picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
  opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
  return np.asarray(opaque.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


program = pathlib.Path(__file__).with_suffix("")  # this file's name without .py
network = jax.export.deserialize(program.read_bytes())
image = read(sys.argv[1]) if len(sys.argv) > 1 else np.zeros((HEIGHT, WIDTH, 3), np.uint8)
probabilities = network.call(image[None])  # uint8 (N, HEIGHT, WIDTH, 3) -> float32 (N, {number})
print(CLASSES[int(probabilities[0].argmax())])
'''


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.check_devices()
    export(options)
    if options.json:
      written = {"program": str(options.out), "example": str(options.example)}
      print(json.dumps(written, indent=2))
    else:
      print(f"program   {options.out}\nexample   {options.example}")


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("export", __doc__)
  command_line.add_network(parser)
  parser.add_argument("--out", required=True, help="the file to write; the example is OUT.py")
  parser.add_argument(
    "--platforms", nargs="+", default=list(PLATFORMS), choices=PLATFORMS, help="default: all"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  options.out = command_line.get_out("--out", options.out)
  options.example = options.out.with_name(f"{options.out.name}.py")
  check_example(options.example)
  options.weights = command_line.find_network(options)
  is_other = options.out.resolve() != options.weights.resolve()
  errors.require(is_other, "--out", str(options.out), "another file than the weights")
  return options


def check_example(path: pathlib.Path) -> None:
  """Raises a UserError where a file that is no such example has its place."""
  start = EXAMPLE.partition("{")[0].encode()
  if path.exists() and not (path.is_file() and path.read_bytes().startswith(start)):
    raise errors.UserError(
      f"{str(path)!r}, where the example belongs, is another file; choose another --out."
    )


def export(options: argparse.Namespace) -> None:
  """Writes the program and the example.

  Raises:
    UserError: the weights are missing or damaged, or the files cannot be written.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  import jax

  from flax_cifar.run import weights as weights_lib

  weights = weights_lib.load_weights(options.weights)
  weights = dataclasses.replace(weights, config={**weights.config, "compute_dtype": zoo.DTYPE})
  program = create_program(weights_lib.create_network(weights), weights, options.platforms)
  text = EXAMPLE.format(
    version=jax.__version__,
    platforms=", ".join(options.platforms),
    classes=list(weights.class_names),
    height=weights.image_shape[0],
    width=weights.image_shape[1],
    number=len(weights.class_names),
  )
  try:
    files.write_bytes(options.out, program)
    files.write_text(options.example, text)
  except OSError as error:
    raise errors.UserError(
      f"--out={str(options.out)!r} cannot be written ({error.strerror}); choose another file."
    ) from error


def create_program(
  model: "nn.Module", weights: "weights_lib.Weights", platforms: Sequence[str]
) -> bytes:
  """The serialized program of a network and its `weights`."""
  import jax
  import jax.export
  import jax.numpy as jnp

  from flax_cifar.data.augment import normalize as normalize_lib
  from flax_cifar.kernels import backend

  normalize = normalize_lib.create_normalize(weights.mean, weights.std, dtype=zoo.DTYPE)

  def predict(images: jax.Array) -> jax.Array:
    variables = jax.tree.map(jnp.asarray, weights.variables)
    logits: Any = model.apply(variables, normalize(images), train=False)
    return jax.nn.softmax(logits)

  (count,) = jax.export.symbolic_shape("n")
  images = jax.ShapeDtypeStruct((count, *weights.image_shape), jnp.uint8)
  with backend.use("definition"):  # the others call code of this machine
    exported = jax.export.export(jax.jit(predict), platforms=list(platforms))(images)
  return bytes(exported.serialize())


if __name__ == "__main__":
  environment.apply_settings()
  main()
