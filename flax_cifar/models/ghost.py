"""Network D, `ghost`: ReLU before ghost batch norm, 1x1 convolutions that pad; 657,146 parameters.

Source: hardayaleva5/EVA5_Phase1_Assignment, Session_7.
"""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks, norms


class Ghost(blocks.Network):
  """Three blocks that end in a pool, two units without norm, the head; receptive field 80 pixels.

  Every convolution has a bias and pads by 1 on all sides unless the code says otherwise, so 1x1,
  3x1 and 1x3 kernels enlarge the feature map. The first unit has no dropout.
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit, order="conv_relu_norm", use_bias=True)
    first = partial(unit, dropout_rate=0.0)
    bare = partial(first, norm=norms.NoNorm)

    x = first(32, name="c1")(images, train)
    x = blocks.MaxPool(2, name="pool1")(unit(32, name="c2")(x, train))
    x = unit(16, kernel_size=1, name="c3")(x, train)
    x = unit(64, kernel_size=(3, 1), name="c4")(x, train)
    x = unit(64, kernel_size=(1, 3), name="c5")(x, train)
    x = blocks.MaxPool(2, name="pool2")(x)
    x = unit(32, kernel_size=1, name="c6")(x, train)
    x = unit(128, dilation=2, padding=2, name="c7")(x, train)
    x = unit(128, dilation=2, name="c8")(x, train)
    x = blocks.MaxPool(2, name="pool3")(x)
    x = bare(256, name="c9")(x, train)
    x = bare(64, name="c10")(x, train)
    x = keep_whole_windows(x, 4)
    return self.get_head(use_bias=True)(x)


def keep_whole_windows(x: Float[Array, "n h w c"], window: int) -> Float[Array, "n h2 w2 c"]:
  """Returns the part of `x` that an average pool by `window` without padding reads.

  The source pools its 5x5 feature map by 4, which gives the mean of the top left 4x4 positions.
  The feature maps of larger images hold more windows; the head averages over all of them.

  Raises:
    Misfit: the feature map is smaller than one window.
  """
  height, width = blocks.check_map(x, "head", at_least=window).shape[1:3]
  return x[:, : height - height % window, : width - width % window]
