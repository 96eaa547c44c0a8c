"""Every implementation of a convolution and every hand-written gradient, compared with XLA and PyTorch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from imgcap_jax.models.encoders import convolution
from imgcap_jax.models.encoders.convolution import ConvNorm, adaptive_average_pool, convolve, max_pool
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def reference(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """XLA's convolution with the padding that PyTorch and TensorFlow define."""
    k = kernel.shape[0]
    groups = 1 if kernel.ndim == 4 else x.shape[-1]
    kernel = kernel if kernel.ndim == 4 else kernel[:, :, None]
    around: Any = "SAME" if padding == "same" else [(k // 2, k // 2)] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=layout, feature_group_count=groups
    )


def assert_close(values: jax.Array, expected: jax.Array) -> None:
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def with_gradients(function: Any, x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """The output of a convolution, and the gradients of x and kernel for a random gradient of the output."""

    def all_of_it(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        y, back = jax.vjp(function, x, kernel)
        return [y, *back(normal(*y.shape))]

    return jax.jit(all_of_it)(x, kernel)


# Sizes at which the stride leaves rows over, sizes at which it does not, and maps smaller than the kernel.
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "padding", "size"),
    [
        ((3, 3, 6), "same", (9, 8)),
        ((3, 3, 6), "same", (3, 2)),
        ((5, 5, 6), "same", (12, 13)),
        ((5, 5, 6), "symmetric", (20, 17)),
        ((3, 3, 6, 4), "symmetric", (28, 29)),
        ((3, 3, 6, 4), "same", (27, 30)),
        ((3, 3, 6, 4), "symmetric", (7, 6)),
        ((7, 7, 6, 2), "symmetric", (33, 30)),
    ],
)
def test_values_and_gradients_equal_xla(
    shape: tuple[int, ...], padding: Any, size: tuple[int, int], stride: int
) -> None:
    x, kernel = normal(3, *size, 6), normal(*shape)
    expected = with_gradients(lambda x, k: reference(x, k, stride, padding), x, kernel)
    for own, other in zip(
        with_gradients(lambda x, k: convolve(x, k, stride, padding), x, kernel), expected, strict=True
    ):
        assert_close(own, other)


@pytest.mark.parametrize("shape", [(3, 3, 3, 4), (3, 3, 6, 4), (6, 4), (5, 5, 6)])
def test_both_platforms_give_the_same_values(shape: tuple[int, ...], as_on: Any) -> None:
    x, kernel = normal(2, 30, 30, 6 if len(shape) < 4 else shape[2]), normal(*shape)
    for stride in (1, 2):
        as_on("cpu")
        on_cpu = convolve(x, kernel, stride, "same" if len(shape) > 2 else "symmetric")
        as_on("gpu")
        assert_close(on_cpu, convolve(x, kernel, stride, "same" if len(shape) > 2 else "symmetric"))


def test_small_maps_and_a_small_stem_use_matrix_products() -> None:
    def convolutions(size: int, channels: int, stride: int) -> int:
        x, kernel = jnp.zeros((1, size, size, channels)), jnp.zeros((3, 3, channels, 4))
        text = jax.jit(lambda x, k: convolve(x, k, stride, "same")).lower(x, kernel).as_text()
        return text.count("stablehlo.convolution")

    assert convolutions(8, 16, 1) == convolutions(16, 16, 2) == convolutions(64, 3, 2) == 0
    assert convolutions(28, 16, 1) == convolutions(28, 16, 2) == convolutions(64, 3, 1) == 1


@pytest.mark.parametrize(("shape", "stride"), [((3, 3, 2), 1), ((5, 5, 2), 2), ((3, 3, 2, 3), 2)])
def test_gradients_equal_finite_differences(shape: tuple[int, ...], stride: int) -> None:
    from jax.test_util import check_grads

    x, kernel = normal(2, 19, 18, 2), normal(*shape)
    # The convolution is linear in each argument, so that a large step is accurate.
    check_grads(lambda x: convolve(x, kernel, stride, "same"), (x,), 1, modes=["rev"], eps=1.0, atol=1e-3, rtol=1e-3)
    check_grads(lambda k: convolve(x, k, stride, "same"), (kernel,), 1, modes=["rev"], eps=1.0, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 3, 6), (3, 3, 6, 4)])
def test_gradients_work_under_map_checkpoint_and_vmap(shape: tuple[int, ...]) -> None:
    x, kernel = normal(4, 24, 24, 6), normal(*shape)

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (reference(x, kernel, 2, "same") ** 2).sum()

    def looped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        one = jax.checkpoint(lambda x: convolve(x, kernel, 2, "same"))
        return (lax.map(one, x.reshape(2, 2, 24, 24, 6)) ** 2).sum()

    def mapped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (jax.vmap(lambda x: convolve(x, kernel, 2, "same"))(x.reshape(2, 2, 24, 24, 6)) ** 2).sum()

    assert "custom_vjp" in str(jax.make_jaxpr(looped)(x, kernel))
    expected = jax.grad(direct, (0, 1))(x, kernel)
    for function in (looped, mapped):
        for own, other in zip(jax.jit(jax.grad(function, (0, 1)))(x, kernel), expected, strict=True):
            assert_close(own, other)


def test_gradient_of_a_bfloat16_bias_is_summed_in_float32() -> None:
    layer = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    graph, params, rest = nnx.split(ConvNorm(layer), nnx.Param, ...)
    x = jnp.ones((2, 64, 64, 1), jnp.bfloat16)

    def total(params: Any) -> jax.Array:
        return nnx.merge(graph, params, rest)(x).astype(jnp.float32).sum()

    gradient = jax.grad(total)(params)
    np.testing.assert_allclose(gradient["bias"][...], 2 * 64 * 64)


def test_depthwise_sums_of_bfloat16_are_rounded_once() -> None:
    x, kernel = normal(1, 16, 16, 8).astype(jnp.bfloat16), normal(5, 5, 8).astype(jnp.bfloat16)
    exact = reference(x.astype(jnp.float32), kernel.astype(jnp.float32), 1, "same")
    np.testing.assert_array_equal(convolve(x, kernel, 1, "same"), exact.astype(jnp.bfloat16))


def test_gradient_of_a_bfloat16_kernel_is_summed_in_float32() -> None:
    # A sum of 4096 ones. In bfloat16 it would stop at 256.
    x, kernel = jnp.ones((1, 64, 64, 1), jnp.bfloat16), jnp.ones((3, 3, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: convolve(x, k, 1, "same").astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[1, 1, 0]) == 4096


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"), [(9, 3, 2, 1), (8, 3, 2, 1), (9, 2, 2, 0), (8, 2, 2, 0)]
)
def test_max_pool_equals_pytorch(size: int, window: int, stride: int, padding: int, oracle: Any, as_on: Any) -> None:
    x = normal(2, size, size + 1, 3) - 5  # negative, so that padding with zeros would change the maximum
    pooled = oracle.torch.nn.functional.max_pool2d(
        oracle.torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), window, stride, padding
    )
    expected = pooled.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(max_pool(x, window, stride, padding), expected)
    as_on("gpu")
    np.testing.assert_array_equal(max_pool(x, window, stride, padding), expected)


@pytest.mark.parametrize("side", [1, 3, 7, 14, 15])
def test_adaptive_pool_equals_pytorch(side: int, oracle: Any) -> None:
    x = normal(2, 7, 10, 3)
    expected = oracle.torch.nn.functional.adaptive_avg_pool2d(
        oracle.torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), side
    )
    np.testing.assert_allclose(adaptive_average_pool(x, side), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_trained_arrays_are_params_and_give_the_same_values() -> None:
    x, kernel = normal(2, 9, 9, 3), normal(3, 3, 3, 4)
    scale, shift, bias = normal(4), normal(4) + 1, normal(4) - 1
    trained = ConvNorm({"kernel": kernel, "scale": scale, "shift": shift, "bias": bias})
    folded = ConvNorm({"kernel": kernel * scale, "shift": shift + bias * scale})
    plain = ConvNorm({"kernel": kernel * scale, "bias": shift + bias * scale})
    assert (type(trained.kernel), type(trained.bias), type(trained.scale)) == (
        convolution.nnx.Param,
        convolution.nnx.Param,
        FrozenVariable,
    )
    assert type(folded.kernel) is FrozenVariable
    assert folded.bias is None
    assert type(plain.kernel) is convolution.nnx.Param
    expected = (reference(x, kernel, 1, "symmetric") + bias) * scale + shift
    for layer in (trained, folded, plain):
        assert_close(layer(x), expected)


def test_programs_for_tpu_have_the_convolutions_of_accelerators() -> None:
    """The platform that is compiled for decides, not the one that compiles."""
    encoder = EfficientNetLite(variant=0, weights="random", trainable_stages=1, checkpoint_stages=True).build(
        32, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(encoder)
    images = jnp.zeros((9, 32, 32, 3), jnp.uint8)
    traced = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).trace(state, images)
    for platform, is_cpu in (("tpu", False), ("cuda", False), ("cpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == is_cpu, platform
        groups = [1, *map(int, re.findall(r"feature_group_count = (\d+)", text))]
        assert (max(groups) == 1) == is_cpu, platform
