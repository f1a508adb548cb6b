"""Network C0, `keras_base`: three pairs of convolutions and a dense head; 1,172,410 parameters.

Source: EVA, session 6A, the network before its improvements.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar import errors
from flax_cifar.kernels import norm_relu
from flax_cifar.models import blocks, dropout


class KerasBase(blocks.Network):
  """Three blocks of a padded and an unpadded unit, pool and dropout; then three dense layers.

  Every layer has a bias. `dropout_rate` applies after the pools; the rate after the dense layers
  is twice as high. Receptive field 36 pixels before the dense layers.

  Raises:
    Misfit: twice `dropout_rate` is 1 or more.
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    rate = self.dropout_rate
    if rate >= 0.5:
      raise errors.Misfit(
        f"dropout_rate={rate} is not below 0.5, and the dense layers use twice of it",
        names=("dropout_rate",),
      )
    unit = self.get_unit(blocks.ConvUnit, dropout_rate=0.0, use_bias=True)

    x = images
    for number, features in enumerate((48, 96, 192), start=1):
      x = unit(features, name=f"c{number}_1")(x, train)
      x = unit(features, padding=0, name=f"c{number}_2")(x, train)
      x = blocks.MaxPool(2, name=f"pool{number}")(x)
      x = dropout.Dropout(rate, name=f"dropout{number}")(x, train)
    x = x.reshape(len(x), -1)
    for number, features in enumerate((512, 256), start=1):
      x = self._dense(x, features, name=f"dense{number}", dtype=self.dtype)
      x = dropout.Dropout(2 * rate, name=f"dense{number}_dropout")(norm_relu.relu(x), train)
    return self._dense(x, self.num_classes, name="head", dtype=jnp.float32)

  def _dense(self, x: Array, features: int, *, name: str, dtype: blocks.DType) -> Array:
    bias_init = blocks.get_bias_init(self.kernel_init, x.shape[-1])
    return nn.Dense(
      features, kernel_init=self.kernel_init, bias_init=bias_init, dtype=dtype, name=name
    )(x)
