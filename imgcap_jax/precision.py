"""The type and the precision of matrix products and convolutions. No other module decides them.

Parameters, optimizer state, losses and the statistics of softmax are float32, whatever the type of the products.

XLA's default for a product of float32 arrays is not float32: bfloat16 passes on TPU, TF32 on recent GPUs. Therefore
every traced function of the package (training step, search, validation, attention maps, feature extraction) enters
``matmul_precision``. The setting of the user, such as JAX_DEFAULT_MATMUL_PRECISION, has no effect inside.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import jax

Dtype = Literal["auto", "float32", "bfloat16"]
Function = TypeVar("Function", bound=Callable[..., Any])

_BFLOAT16_PLATFORMS = ("tpu", "gpu", "cuda", "rocm")


def compute_dtype(dtype: Dtype, platform: str | None = None) -> Literal["float32", "bfloat16"]:
    """The type of products that a setting stands for: "auto" is bfloat16 on TPU and GPU, float32 elsewhere.

    Args:
        dtype: the setting.
        platform: "cpu", "gpu" or "tpu": where the program will run; None: JAX's default device.
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if (platform or default_platform()) in _BFLOAT16_PLATFORMS else "float32"


def frozen_dtype(dtype: Dtype) -> Literal["float32", "bfloat16"]:
    """The type of products of a frozen encoder whose features are stored: "auto" is float32 on every platform.

    Features are computed once and used by programs on other platforms, which must compute the same ones for new photos.
    """
    return "float32" if dtype == "auto" else dtype


def default_platform() -> str:
    """The platform of JAX's default device."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


def matmul_precision(dtype: str) -> AbstractContextManager[None]:
    """While entered, products of float32 arrays are traced with the precision that belongs to a type of products.

    "float32": full precision. "bfloat16": the fastest of the device, for the few products that are left in float32.
    """
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def at_precision(function: Function, dtype: str) -> Function:
    """The function, traced within ``matmul_precision``. Its derivatives are covered if it computes them itself."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with matmul_precision(dtype):
            return function(*arguments, **options)

    return traced  # type: ignore[return-value]
