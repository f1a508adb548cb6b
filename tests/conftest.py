"""Settings that must precede the first import of JAX: four CPU devices, strict ranks, no GPU."""

import os

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
