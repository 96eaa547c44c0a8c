"""The type and the precision of products, read from the traced programs: step, search, validation, encoder, maps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from imgcap_jax import precision
from imgcap_jax.cli.experiments import find
from imgcap_jax.data.images import decode
from imgcap_jax.data.sources import open_source
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, differences, from_json, to_json
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.extraction import Extraction, encoder_dtype
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import attention_function, caption_function
from imgcap_jax.run.validation import Validation
from imgcap_jax.train import train
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.self_critical import SelfCritical

HIGHEST = jax.lax.Precision.HIGHEST


@pytest.fixture
def tiny(tiny_file: Path, tiny_data: Path) -> Experiment:
    """The tiny experiment, with attention to projected regions."""
    experiment = find(str(tiny_file))
    return replace(
        experiment,
        data=replace(experiment.data, data_dir=tiny_data),
        decoder=replace(experiment.decoder, region_size=8),
    )


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from equations(inner)


def products(jaxpr: Any) -> list[tuple[str, Any, tuple[str, ...]]]:
    """(primitive, precision, dtypes of the operands) of all products and convolutions."""
    return [
        (one.primitive.name, one.params["precision"], tuple(str(of.aval.dtype) for of in one.invars))
        for one in equations(jaxpr)
        if one.primitive.name in ("dot_general", "conv_general_dilated")
    ]


def check_full(jaxpr: Any) -> None:
    """All products are of float32 arrays at the highest precision."""
    found = products(jaxpr)
    assert found
    assert {(precision, dtypes) for _, precision, dtypes in found} == {((HIGHEST, HIGHEST), ("float32", "float32"))}


def traced_step(experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The jaxpr of the step that ``train`` compiles, from its first call. Nothing is compiled."""

    class Seen(Exception):
        pass

    compiled = DataParallel.compile

    def compile(self: DataParallel, step: Any) -> Callable[..., Any]:
        whole = compiled(self, step)

        def call(*arguments: Any) -> Any:
            raise Seen(jax.make_jaxpr(whole)(*arguments))

        return call

    monkeypatch.setattr(DataParallel, "compile", compile)
    monkeypatch.setattr(Validation, "__call__", lambda self, state, progress: progress)
    with pytest.raises(Seen) as seen:
        train(experiment, folder / "run", cache=folder / "cache", show=lambda line: None, **options)
    return seen.value.args[0]


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_training_step_in_float32(
    tiny: Experiment, parallel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, training=replace(tiny.training, parallel=parallel))
    with jax.default_matmul_precision("bfloat16"):  # a setting of the user has no effect
        jaxpr = traced_step(tiny, tmp_path, monkeypatch)
    check_full(jaxpr)
    assert "conv_general_dilated" in {name for name, *_ in products(jaxpr)}


def test_training_step_in_bfloat16(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are of bfloat16 arrays. Losses, softmax and the optimizer are in float32."""
    tiny = replace(tiny, training=replace(tiny.training, dtype="bfloat16"))
    jaxpr = traced_step(tiny, tmp_path, monkeypatch)
    found = products(jaxpr)
    assert all("bfloat16" in dtypes for *_, dtypes in found)
    # A few have one float32 operand, the gradient of float32 logits.
    assert sum(dtypes == ("bfloat16", "bfloat16") for *_, dtypes in found) > 0.8 * len(found)
    for one in equations(jaxpr):
        if one.primitive.name in ("exp", "log", "reduce_max", "sqrt", "rsqrt", "psum"):
            assert one.invars[0].aval.dtype in (jnp.float32, jnp.int32), one
    state = jax.tree.leaves(jaxpr.in_avals)
    assert jnp.bfloat16 not in {leaf.dtype for leaf in state}
    assert jnp.bfloat16 not in {leaf.dtype for leaf in jaxpr.out_avals}


def test_self_critical_step_in_float32(
    tiny_file: Path, tiny_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = find(str(tiny_file))
    experiment = replace(
        experiment,
        data=replace(experiment.data, data_dir=tiny_data),
        objective=SelfCritical(samples=2, baseline="greedy", kl=0.1),
    )
    check_full(traced_step(experiment, tmp_path, monkeypatch, init_from=trained))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_search_and_attention(tiny: Experiment, dtype: Any, tmp_path: Path) -> None:
    tiny = replace(tiny, training=replace(tiny.training, dtype=dtype))
    vocabulary = Vocabulary.from_counts(dict.fromkeys("abcdefgh", 1), 1, tiny.data.tokenizer)
    model = Run(tmp_path, tiny, vocabulary).model(with_encoder=True, restored=True)
    graph, params, frozen = split_trained(model)
    batch = {"image": np.zeros((2, 32, 32, 3), np.uint8)}
    tokens = np.full((2, 3, 5), 4, np.int32)
    found = [
        jax.make_jaxpr(caption_function([graph], decoding, vocabulary))([params], [frozen], [batch])
        for decoding in (Decoding(beam=1), Decoding(beam=3), Decoding(samples=2))
    ]
    found.append(jax.make_jaxpr(attention_function(graph))(params, frozen, batch, tokens))
    for jaxpr in found:
        if dtype == "float32":
            check_full(jaxpr)
            continue
        assert {dtypes for *_, dtypes in products(jaxpr)} == {("bfloat16", "bfloat16")}
        for one in equations(jaxpr):
            if one.primitive.name in ("exp", "log", "reduce_max"):
                assert one.invars[0].aval.dtype in (jnp.float32, jnp.int32), one


class ThirdsEncoder(nnx.Module):
    """Each row of pixels is a region, divided by 3."""

    region_count, region_size = 32, 96

    def __call__(self, images: Any) -> Any:
        return images.reshape(-1, self.region_count, self.region_size).astype("float32") / 3


@dataclass(frozen=True)
class Thirds:
    """Settings of a frozen encoder whose features are not exact in 16 bits."""

    region_size: int = 96
    frozen: bool = True

    def build(self, image_size: int, **_: Any) -> ThirdsEncoder:
        return ThirdsEncoder()


@pytest.mark.parametrize("feature_dtype", ["float16", "bfloat16"])
def test_new_photos_get_the_regions_of_the_store(tiny: Experiment, feature_dtype: Any, tmp_path: Path) -> None:
    tiny = replace(tiny, encoder=Thirds(), data=replace(tiny.data, views=2, feature_dtype=feature_dtype))
    source = open_source("scenes", "val", tiny.data.data_dir)
    store = Extraction(tiny, tmp_path, progress=False).regions(source, views=1)
    vocabulary = Vocabulary.from_counts({"a": 1}, 1, tiny.data.tokenizer)
    model = Run(tmp_path, tiny, vocabulary).model(with_encoder=True)
    graph, state = nnx.split(model)
    images = np.stack([decode(example.image, 32) for example in source])
    regions = jax.jit(lambda images: nnx.merge(graph, state).regions({"image": images}))(images)
    assert regions.dtype == jnp.float32
    assert np.abs(np.asarray(regions) - images.reshape(regions.shape) / np.float32(3)).max() > 0  # rounded
    for i, own in enumerate(np.asarray(regions)):
        np.testing.assert_array_equal(own, store.read(i, 0)[0].astype(np.float32))


def test_auto_follows_the_platform(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.training.dtype == "auto"
    assert '"dtype": "auto"' in to_json(tiny)
    assert from_json(to_json(tiny), "here") == tiny
    found = [precision.compute_dtype("auto", platform) for platform in ("cpu", "gpu", "tpu", None)]
    assert found == ["float32", "bfloat16", "bfloat16", "float32"]
    assert precision.compute_dtype("float32", "tpu") == "float32"
    assert precision.compute_dtype("bfloat16", "cpu") == "bfloat16"
    with jax.default_device(jax.devices("cpu")[1]):
        assert precision.default_platform() == "cpu"
    # The encoder of stored features is computed in one type everywhere.
    stored = replace(tiny, encoder=Thirds(), data=replace(tiny.data, views=2))
    assert [encoder_dtype(one, "tpu") for one in (tiny, stored)] == ["bfloat16", "float32"]
    in_bfloat16 = replace(stored, training=replace(stored.training, dtype="bfloat16"))
    assert encoder_dtype(in_bfloat16, "cpu") == "bfloat16"


def test_settings_of_the_same_type_resume_each_other(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_dtype(dtype: Any) -> Experiment:
        return replace(tiny, training=replace(tiny.training, dtype=dtype))

    assert not differences(with_dtype("float32"), with_dtype("auto"))
    assert differences(with_dtype("bfloat16"), with_dtype("auto")) == ["training.dtype: bfloat16 -> auto"]
    monkeypatch.setattr(precision, "default_platform", lambda: "tpu")
    assert differences(with_dtype("float32"), with_dtype("auto")) == ["training.dtype: float32 -> auto"]
    # The features of a frozen encoder differ.
    assert differences(with_dtype("bfloat16"), with_dtype("auto")) == ["training.dtype: bfloat16 -> auto"]
