"""Names of ViT's and ConvNeXt's tensors, compared with timm 1.0.31, transformers 5.24 and open_clip 3.3 themselves."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders import convnext, vit
from imgcap_jax.models.encoders.contract import weights_digest
from imgcap_jax.models.encoders.pretrained import sources
from imgcap_jax.models.encoders.pretrained.schemes import SCHEMES, SchemeFamily, find_scheme, select_by_scheme
from imgcap_jax.models.encoders.pretrained.sources import known_weights, load_tensors
from imgcap_jax.models.encoders.vit import ViT, ViTArchitecture

ARCHITECTURES: dict[str, Any] = {**vit.ARCHITECTURES, **convnext.ARCHITECTURES}


def names_and_shapes(model: str, library: str, prefix: str = "", *, class_position: bool = False) -> dict[str, Any]:
    """The tensors that the file of a library must have, without axes of size 1 (they differ between libraries)."""
    architecture = ARCHITECTURES[model]
    scheme = SCHEMES[architecture.family][library]
    found = {}
    for ours, shape in architecture.shapes().items():
        if ours == "pos_embed":
            shape = (shape[0] + class_position, shape[1])
        parts = scheme.parts(ours)
        for part in parts:
            found[prefix + part] = [size for size in (shape[0] // len(parts), *shape[1:]) if size > 1]
    return found


def digest(tensors: dict[str, Any]) -> str:
    lines = sorted(f"{name} {shape}" for name, shape in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# Computed as in `digest`, from the state dicts of the libraries, without heads, text encoders and mask tokens.
TIMM = {
    "vit_base_patch32_clip_224": "8b6c88235a0a98d7",
    "vit_base_patch16_clip_224": "72cb8973f66aadd0",
    "vit_large_patch14_clip_224": "659128a49217a0d9",
    "vit_large_patch14_clip_336": "4688dd97e91b1c79",
    "vit_base_patch32_siglip_256": "1178c523d4a3ec95",
    "vit_base_patch16_siglip_224": "997d8bb589344ac9",
    "vit_base_patch16_siglip_256": "937cd07203e4b036",
    "vit_base_patch16_siglip_384": "efdf32ecac19288e",
    "vit_base_patch16_siglip_512": "df7bc41c46158174",
    "vit_large_patch16_siglip_256": "181d5d6a1bc7d572",
    "vit_large_patch16_siglip_384": "51a07a614966f5d4",
    "vit_large_patch16_siglip_512": "beee3d89d3e8fc37",
    "vit_so400m_patch14_siglip_224": "be61c01c7d150881",
    "vit_so400m_patch14_siglip_378": "d6dea2388ed74e14",
    "vit_so400m_patch16_siglip_256": "957800e96840c85d",
    "vit_so400m_patch16_siglip_384": "427bd1439dea3eea",
    "vit_so400m_patch16_siglip_512": "71ce33f8efe96115",
    "vit_small_patch14_dinov2": "d9ddabeec2bddd5a",
    "vit_small_patch14_reg4_dinov2": "0a055981f0035cbc",
    "vit_small_patch16_dinov3": "502b0f58bf86014a",
    "vit_base_patch14_dinov2": "90f4ce124233d85a",
    "vit_base_patch14_reg4_dinov2": "252c1734054e786b",
    "vit_base_patch16_dinov3": "2af4fd384e1ab783",
    "vit_large_patch14_dinov2": "7a643d5a26b097bb",
    "vit_large_patch14_reg4_dinov2": "42b1341ade51c9e2",
    "vit_large_patch16_dinov3": "a0c070ce3f289573",
    "convnext_tiny": "2ef2b81e2f07c101",
    "convnext_small": "8875c3aca451d272",
    "convnext_base": "9413a5b2e947d519",
    "convnext_large": "fcd0a21c48a44b13",
    "convnext_xlarge": "7c54cdf24f93b1d5",
    "convnextv2_atto": "6c1e64337048dbf2",
    "convnextv2_femto": "68efdd7b9d781855",
    "convnextv2_pico": "acb71f491c85a213",
    "convnextv2_nano": "6806b40eaeba1fa1",
    "convnextv2_tiny": "a06f001291d7a7aa",
    "convnextv2_base": "aeff8377073cafeb",
    "convnextv2_large": "715abfd3b5912491",
    "convnextv2_huge": "43c595919ba6092c",
}


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_network_has_the_names_and_shapes_of_timm(model: str) -> None:
    family = ARCHITECTURES[model].family
    class_position = family == "clip" or (family == "dinov2" and "reg4" not in model)
    found = names_and_shapes(model, "timm", class_position=class_position)
    # DINOv3 has no bias of keys.
    assert digest({name: shape for name, shape in found.items() if not name.endswith("k_bias")}) == TIMM[model]


@pytest.mark.parametrize(
    ("model", "library", "prefix", "class_position", "expected"),
    [
        # The files that `save_pretrained` writes, which have the names of those on the Hugging Face Hub.
        ("vit_base_patch32_clip_224", "transformers", "vision_model.", True, "1fe7b4a5f84c2d52"),
        ("vit_base_patch16_siglip_224", "transformers", "vision_model.", False, "551e71fd633a2ee8"),
        ("vit_small_patch14_dinov2", "transformers", "", True, "607722dfc65fb90e"),
        ("vit_small_patch14_reg4_dinov2", "transformers", "", True, "560920bf2efb324b"),
        ("vit_small_patch16_dinov3", "transformers", "", False, "6a9cdfac9e0deb49"),
        ("convnext_tiny", "transformers", "convnext.", False, "71199b068c8785f2"),
        ("convnextv2_atto", "transformers", "convnextv2.", False, "43c62849395f275e"),
        ("convnext_tiny", "transformers, DINOv3", "", False, "9a8d45f6d67b2fee"),
        # The state dicts of transformers 5.
        ("vit_small_patch14_dinov2", "transformers 5", "", True, "43981fbeb3f4ddfe"),
        ("vit_small_patch14_reg4_dinov2", "transformers 5", "", True, "d45cb5161ae8b813"),
        ("vit_small_patch16_dinov3", "transformers 5", "", False, "728f865430619af4"),
        ("convnext_tiny", "transformers 5, DINOv3", "", False, "3637d96577efca0a"),
        ("vit_base_patch32_clip_224", "open_clip", "visual.", True, "11ce2d9b30402c2a"),
        ("vit_base_patch16_siglip_224", "timm", "visual.trunk.", False, "acbf5a1d2cd5b460"),
    ],
)
def test_networks_have_the_names_and_shapes_of_other_libraries(
    model: str, library: str, prefix: str, class_position: bool, expected: str
) -> None:
    found = names_and_shapes(model, library, prefix, class_position=class_position)
    assert (
        digest(
            {name: shape for name, shape in found.items() if not name.endswith("k_proj.bias") or "dinov3" not in model}
        )
        == expected
    )


@pytest.mark.parametrize(
    ("family", "library", "ours", "theirs"),
    [
        ("clip", "open_clip", "norm_pre.weight", ["ln_pre.weight"]),
        ("clip", "open_clip", "norm.bias", ["ln_post.bias"]),
        ("clip", "open_clip", "blocks.3.norm1.weight", ["transformer.resblocks.3.ln_1.weight"]),
        ("clip", "open_clip", "blocks.3.mlp.fc1.bias", ["transformer.resblocks.3.mlp.c_fc.bias"]),
        ("clip", "transformers", "norm_pre.weight", ["pre_layrnorm.weight"]),
        ("clip", "transformers", "norm.weight", ["post_layernorm.weight"]),
        ("clip", "transformers", "blocks.3.norm2.bias", ["encoder.layers.3.layer_norm2.bias"]),
        (
            *("clip", "transformers", "blocks.3.attn.qkv.weight"),
            [f"encoder.layers.3.self_attn.{part}_proj.weight" for part in "qkv"],
        ),
        (
            *("dinov2", "transformers", "blocks.3.attn.qkv.bias"),
            [f"encoder.layer.3.attention.attention.{part}.bias" for part in ("query", "key", "value")],
        ),
        ("dinov2", "transformers", "blocks.3.attn.proj.weight", ["encoder.layer.3.attention.output.dense.weight"]),
        ("dinov2", "transformers", "blocks.3.ls2.gamma", ["encoder.layer.3.layer_scale2.lambda1"]),
        ("dinov3", "timm", "blocks.3.attn.qkv.weight", ["blocks.3.attn.qkv.weight"]),
        ("dinov3", "timm", "blocks.3.attn.qkv.bias", [f"blocks.3.attn.{part}_bias" for part in "qkv"]),
        ("dinov3", "timm", "blocks.3.ls1.gamma", ["blocks.3.gamma_1"]),
        ("dinov3", "transformers", "blocks.3.mlp.fc1.weight", ["layer.3.mlp.up_proj.weight"]),
        ("dinov3", "transformers", "blocks.3.mlp.fc2.weight", ["layer.3.mlp.down_proj.weight"]),
        ("convnext", "transformers", "stem.1.bias", ["embeddings.layernorm.bias"]),
        ("convnext", "transformers", "stages.1.downsample.0.bias", ["encoder.stages.1.downsampling_layer.0.bias"]),
        ("convnext", "transformers", "stages.2.blocks.4.norm.bias", ["encoder.stages.2.layers.4.layernorm.bias"]),
        ("convnext", "transformers", "stages.2.blocks.4.mlp.fc2.bias", ["encoder.stages.2.layers.4.pwconv2.bias"]),
        ("convnext", "transformers", "head.norm.weight", ["layernorm.weight"]),
        ("convnext", "transformers, DINOv3", "stem.1.weight", ["stages.0.downsample_layers.1.weight"]),
        (
            "convnext",
            "transformers, DINOv3",
            "stages.2.blocks.4.mlp.fc1.bias",
            ["stages.2.layers.4.pointwise_conv1.bias"],
        ),
    ],
)
def test_each_tensor_has_the_right_name(family: SchemeFamily, library: str, ours: str, theirs: list[str]) -> None:
    assert SCHEMES[family][library].parts(ours) == theirs


def random_file(architecture: Any, library: str, prefix: str = "", *, class_position: bool = False) -> dict[str, Any]:
    """A state dict of a library. bfloat16 represents its values exactly."""
    random, scheme = np.random.default_rng(0), SCHEMES[architecture.family][library]
    held: dict[str, Any] = {"text_model.encoder.layers.0.mlp.fc1.weight": np.zeros((2, 2), "f4")}
    for ours, shape in architecture.shapes().items():
        if ours == "pos_embed":
            shape = (1, shape[0] + class_position, shape[1])
        parts = scheme.parts(ours)
        for part in parts:
            values = random.integers(-128, 128, (shape[0] // len(parts), *shape[1:])).astype("f4") / 64
            held[prefix + part] = values
    return held


TINY = ViTArchitecture("vit_tiny", "clip", 4, 2, 2, 6, 2, 3)


def test_query_key_and_value_are_stacked_in_this_order_and_the_class_token_gets_its_position() -> None:
    held = random_file(TINY, "transformers", "vision_model.", class_position=True)
    found = select_by_scheme(held, "clip", TINY.shapes(), "clip.safetensors")
    attention = "vision_model.encoder.layers.1.self_attn."
    expected = np.concatenate([held[f"{attention}{part}_proj.weight"] for part in "qkv"])
    assert np.array_equal(found["blocks.1.attn.qkv.weight"], expected)
    positions = held["vision_model.embeddings.position_embedding.weight"][0]
    assert np.array_equal(found["cls_token"], held["vision_model.embeddings.class_embedding"] + positions[0])
    assert np.array_equal(found["pos_embed"], positions[1:])


def test_biases_that_dinov3_does_not_have_are_zero() -> None:
    architecture = ViTArchitecture("vit_tiny", "dinov3", 4, 1, 2, 6, 2, 0, registers=2)
    held = random_file(architecture, "transformers")
    del held["layer.0.attention.k_proj.bias"]
    bias = select_by_scheme(held, "dinov3", architecture.shapes(), "dinov3.safetensors")["blocks.0.attn.qkv.bias"]
    assert bias[:4].all()
    assert not bias[4:8].any()
    del held["layer.0.attention.v_proj.bias"]
    with pytest.raises(UserError, match=r"layer.0.attention.v_proj.bias is missing"):
        select_by_scheme(held, "dinov3", architecture.shapes(), "dinov3.safetensors")
    held = random_file(architecture, "timm")
    for part in "qkv":
        del held[f"blocks.0.attn.{part}_bias"]
    bias = select_by_scheme(held, "dinov3", architecture.shapes(), "dinov3.safetensors")["blocks.0.attn.qkv.bias"]
    assert not bias.any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda held: held.pop("blocks.1.mlp.fc1.bias"), "tensor blocks.1.mlp.fc1.bias is missing"),
        (
            lambda held: held.update({"blocks.1.mlp.fc1.bias": np.zeros(5, "f4")}),
            r"tensor blocks.1.mlp.fc1.bias has shape \[5\], the network needs \[6\]",
        ),
        (
            lambda held: held.update({"blocks.1.mlp.fc1.weight": np.zeros((4, 6), "f4")}),
            r"tensor blocks.1.mlp.fc1.weight has shape \[4, 6\], the network needs \[6, 4\]",
        ),
        (
            lambda held: held.update({"pos_embed": np.zeros((1, 17, 4), "f4")}),
            r"tensor pos_embed has shape \[1, 17, 4\], the network needs \[9, 4\]",
        ),
        (
            lambda held: held.update({"norm.bias": np.zeros(4, np.int32)}),
            "tensor norm.bias holds int32, not floating-point numbers",
        ),
        (
            lambda held: held.update({"blocks.2.norm1.weight": np.zeros(4, "f4")}),
            "tensor blocks.2.norm1.weight is not part of this network",
        ),
        # The registers of DINOv2, the gate of DINOv3's larger networks, and blocks that go on.
        (lambda held: held.update({"reg_token": np.zeros((1, 4, 4), "f4")}), "tensor reg_token is not part of"),
        (
            lambda held: held.update({"blocks.0.mlp.gate_proj.weight": np.zeros((6, 4), "f4")}),
            "tensor blocks.0.mlp.gate_proj.weight is not part of this network",
        ),
        (lambda held: held.clear(), "do not have the names that open_clip or timm or transformers gives this"),
    ],
)
def test_a_wrong_file_is_refused(spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    held = random_file(TINY, "timm", class_position=True)
    select_by_scheme(held, "clip", TINY.shapes(), "clip.pth")
    spoil(held)
    with pytest.raises(UserError, match=rf"^clip\.pth: .*{message}"):
        select_by_scheme(held, "clip", TINY.shapes(), "clip.pth")


def test_a_deeper_convnext_is_refused() -> None:
    held = random_file(convnext.ARCHITECTURES["convnext_small"], "timm")
    with pytest.raises(UserError, match=r"stages\.2\.blocks\.9\.\S+ is not part of this network"):
        select_by_scheme(held, "convnext", convnext.ARCHITECTURES["convnext_tiny"].shapes(), "small.safetensors")


def test_a_text_encoder_is_not_taken_for_an_image_encoder() -> None:
    held = {f"transformer.resblocks.0.attn.in_proj_{part}": np.zeros(4, "f4") for part in ("weight", "bias")}
    assert find_scheme("clip", held) is None


def test_files_have_the_normalisation_of_their_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    held = {
        name: value.astype(ml_dtypes.bfloat16) for name, value in random_file(TINY, "timm", class_position=True).items()
    }
    safetensors.numpy.save_file(held, path)
    read = load_tensors(str(path), family="clip", network="vit_base_patch16_clip_224", shapes=TINY.shapes())
    assert np.array_equal(read.tensors["norm.bias"], held["norm.bias"].astype("f4"))
    # The means and deviations of https://github.com/openai/CLIP, in fractions.
    assert read.mean == pytest.approx([255 * value for value in (0.48145466, 0.4578275, 0.40821073)], abs=1e-5)
    assert read.std == pytest.approx([255 * value for value in (0.26862954, 0.26130258, 0.27577711)], abs=1e-5)
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_base_patch16_clip_224", TINY)
    settings = ViT(model="vit_base_patch16_clip_224", weights=str(path))
    first = weights_digest(settings)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}')
    assert settings.build(6, rngs=nnx.Rngs(0)).mean == (127.5, 127.5, 127.5)
    assert weights_digest(settings) != first
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert settings.build(6, rngs=nnx.Rngs(0)).mean == (102.0, 127.5, 127.5)
    assert len({first, weights_digest(settings)}) == 2


@pytest.mark.parametrize(
    ("model", "default"),
    [
        ("vit_base_patch32_clip_224", "timm/vit_base_patch32_clip_224.openai"),
        ("vit_base_patch16_siglip_384", "timm/vit_base_patch16_siglip_384.v2_webli"),
        ("vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("vit_small_patch16_dinov3", "timm/vit_small_patch16_dinov3_qkvb.lvd1689m"),
        ("convnext_tiny", "timm/convnext_tiny.fb_in1k"),
        ("convnext_xlarge", "timm/convnext_xlarge.fb_in22k_ft_in1k"),
        ("convnextv2_nano", "timm/convnextv2_nano.fcmae_ft_in1k"),
    ],
)
def test_default_weights_are_those_of_timm(
    model: str, default: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(
        sources, "_fetch", lambda url, path, **_: fetched.append(url) or tmp_path / "absent.safetensors"
    )
    word = "pretrained" if model.startswith("vit") else "imagenet"
    assert default in known_weights(model)
    architecture = ARCHITECTURES[model]
    with pytest.raises(UserError, match=r"absent\.safetensors"):
        load_tensors(word, family=architecture.family, network=model, shapes=architecture.shapes())
    assert fetched[-1] == f"https://huggingface.co/{default}/resolve/main/model.safetensors"


def test_unknown_names_are_refused() -> None:
    shapes = TINY.shapes()
    with pytest.raises(UserError, match=re.escape("did you mean timm/vit_base_patch16_clip_224.openai?")):
        load_tensors(
            "timm/vit_base_patch16_clip_224.openia", family="clip", network="vit_base_patch16_clip_224", shapes=shapes
        )
    with pytest.raises(UserError, match="do not belong to vit_base_patch16_clip_224"):
        load_tensors("timm/convnext_tiny.fb_in1k", family="clip", network="vit_base_patch16_clip_224", shapes=shapes)
    with pytest.raises(UserError, match="neither a file nor a known name"):
        load_tensors("imagenet", family="clip", network="vit_base_patch16_clip_224", shapes=shapes)
