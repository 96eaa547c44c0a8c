"""The names of ViT's and ConvNeXt's tensors in files of timm, transformers and open_clip.

Our own names are timm's; our shapes differ from timm's in three tensors (see `select_by_scheme`). The names here are
those of timm 1.0.31, open_clip 3.3 and transformers 5.24, and those in the files of transformers' `save_pretrained`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.pretrained.weights import WRONG_FILE, select_tensors

SchemeFamily = Literal["clip", "siglip", "dinov2", "dinov3", "convnext"]
FAMILIES: tuple[SchemeFamily, ...] = get_args(SchemeFamily)


@dataclass(frozen=True)
class Scheme:
    """How a library names the tensors of a network.

    Attributes:
        mark: a tensor that tells this scheme from the others, without the prefix.
        prefixes: what can stand before all names.
        renames: regular expressions and their replacements, which turn our name into that of the file.
        qkv: the parts of the queries', keys' and values' weights, in our order, if the file does not hold them in one
            tensor.
        qkv_bias: the same of their biases.
    """

    mark: str
    prefixes: tuple[str, ...] = ("",)
    renames: tuple[tuple[str, str], ...] = ()
    qkv: tuple[str, ...] = ()
    qkv_bias: tuple[str, ...] = ()

    def name(self, ours: str) -> str:
        """The name of a tensor in the file, without the prefix; that of the fused one for queries, keys and values."""
        for pattern, replacement in self.renames:
            ours = re.sub(pattern, replacement, ours)
        return ours

    def parts(self, ours: str) -> list[str]:
        """The names of the tensors in the file that are stacked, without the prefix."""
        name = self.name(ours)
        if not name.endswith(("qkv.weight", "qkv.bias")):
            return [name]
        start, _, kind = name.rpartition("qkv.")
        parts = self.qkv if kind == "weight" else self.qkv_bias
        return [f"{start}{part}" for part in parts] or [name]


def _projections(*names: str) -> dict[str, tuple[str, ...]]:
    return {"qkv": tuple(f"{name}.weight" for name in names), "qkv_bias": tuple(f"{name}.bias" for name in names)}


_OPEN_CLIP = Scheme(
    mark="transformer.resblocks.0.attn.in_proj_weight",
    prefixes=("visual.",),
    renames=(
        (r"^patch_embed\.proj", "conv1"),
        ("^cls_token", "class_embedding"),
        ("^pos_embed", "positional_embedding"),
        ("^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        ("^blocks", "transformer.resblocks"),
        (r"\.norm(\d)", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    ),
)
_TRANSFORMERS_CLIP = Scheme(
    mark="encoder.layers.0.self_attn.q_proj.weight",
    prefixes=("vision_model.", ""),
    renames=(
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        ("^cls_token", "embeddings.class_embedding"),
        ("^pos_embed", "embeddings.position_embedding.weight"),
        ("^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        ("^blocks", "encoder.layers"),
        (r"\.norm(\d)", r".layer_norm\1"),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"\.attn\.", ".self_attn."),
    ),
    **_projections("q_proj", "k_proj", "v_proj"),
)
_DINO_OUTSIDE = (
    ("^cls_token", "embeddings.cls_token"),
    ("^reg_token", "embeddings.register_tokens"),
    ("^pos_embed", "embeddings.position_embeddings"),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
)
_DINOV2 = (
    *_DINO_OUTSIDE,
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    ("^blocks", "encoder.layer"),
)
_DINOV2_PREFIXES = ("", "dinov2.", "dinov2_with_registers.")
_DINOV3 = (
    *_DINO_OUTSIDE,
    (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
    (r"attn\.proj", "attention.o_proj"),
    (r"\.attn\.", ".attention."),
    (r"mlp\.fc1", "mlp.up_proj"),
    (r"mlp\.fc2", "mlp.down_proj"),
)
_CONVNEXT = (
    (r"^head\.norm", "layernorm"),
    (r"\.norm\.", ".layernorm."),
    (r"^stem\.0", "embeddings.patch_embeddings"),
    (r"^stem\.1", "embeddings.layernorm"),
    ("^stages", "encoder.stages"),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.", ".layers."),
    (r"\.gamma", ".layer_scale_parameter"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"mlp\.fc", "pwconv"),
    (r"mlp\.grn", "grn"),
)
_DINOV3_CONVNEXT = (
    (r"^head\.norm", "layer_norm"),
    (r"\.norm\.", ".layer_norm."),
    (r"^stem\.", "stages.0.downsample_layers."),
    (r"\.downsample\.", ".downsample_layers."),
    (r"\.blocks\.", ".layers."),
    (r"\.conv_dw\.", ".depthwise_conv."),
    (r"mlp\.fc", "pointwise_conv"),
)
_TIMM = Scheme("blocks.0.attn.qkv.weight", prefixes=("", "visual.trunk."))

SCHEMES: Mapping[SchemeFamily, Mapping[str, Scheme]] = {
    "clip": {"timm": _TIMM, "open_clip": _OPEN_CLIP, "transformers": _TRANSFORMERS_CLIP},
    "siglip": {"timm": _TIMM, "transformers": _TRANSFORMERS_CLIP},
    "dinov2": {
        "timm": _TIMM,
        "transformers": Scheme(
            "encoder.layer.0.attention.attention.query.weight",
            _DINOV2_PREFIXES,
            (*_DINOV2, (r"attn\.proj", "attention.output.dense"), (r"\.attn\.", ".attention.attention.")),
            **_projections("query", "key", "value"),
        ),
        "transformers 5": Scheme(
            "encoder.layer.0.attention.q_proj.weight",
            _DINOV2_PREFIXES,
            (*_DINOV2, (r"attn\.proj", "attention.o_proj"), (r"\.attn\.", ".attention.")),
            **_projections("q_proj", "k_proj", "v_proj"),
        ),
    },
    "dinov3": {
        "timm": Scheme(
            "blocks.0.attn.qkv.weight",
            renames=((r"\.ls(\d)\.gamma", r".gamma_\1"),),
            qkv_bias=("q_bias", "k_bias", "v_bias"),
        ),
        "transformers": Scheme(
            "layer.0.attention.q_proj.weight",
            renames=(*_DINOV3, ("^blocks", "layer")),
            **_projections("q_proj", "k_proj", "v_proj"),
        ),
        "transformers 5": Scheme(
            "model.layer.0.attention.q_proj.weight",
            renames=(*_DINOV3, ("^blocks", "model.layer")),
            **_projections("q_proj", "k_proj", "v_proj"),
        ),
    },
    "convnext": {
        "timm": Scheme("stages.0.blocks.0.conv_dw.weight"),
        "transformers": Scheme(
            "encoder.stages.0.layers.0.dwconv.weight", ("", "convnext.", "convnextv2."), renames=_CONVNEXT
        ),
        "transformers, DINOv3": Scheme("stages.0.layers.0.depthwise_conv.weight", renames=_DINOV3_CONVNEXT),
        "transformers 5, DINOv3": Scheme(
            "model.stages.0.layers.0.depthwise_conv.weight",
            renames=(*_DINOV3_CONVNEXT, ("^stages", "model.stages")),
        ),
    },
}
"""The schemes of each family, by the name of the library. The first whose mark is in a file is that of the file."""


def find_scheme(family: SchemeFamily, held: Collection[str]) -> tuple[Scheme, str] | None:
    """The scheme of a file with these names, and the prefix of the names; None: no known one."""
    for scheme in SCHEMES[family].values():
        for prefix in scheme.prefixes:
            if prefix + scheme.mark in held:
                return scheme, prefix
    return None


def select_by_scheme(
    held: Mapping[str, np.ndarray], family: SchemeFamily, shapes: Mapping[str, Sequence[int]], source: str
) -> dict[str, np.ndarray]:
    """The tensors of a network under our names, as float32.

    Tensors of a classifier, a pooling head or a text encoder are ignored. Tokens, blocks and tensors of blocks that the
    network does not have are errors, because the file then belongs to another network.

    Our shapes are timm's except for ``cls_token`` [D], ``reg_token`` [R,D] and ``pos_embed`` [N,D], which has one row
    per patch: the row of the class token (if any) is added to ``cls_token``. Biases of queries, keys and values that a
    file of DINOv3 does not hold are 0: the network has none for keys, and timm leaves the others out.

    Args:
        held: the tensors of the file.
        family: the family of the network.
        shapes: the shapes that the network needs, by our name.
        source: the name of the file, for messages.

    Raises:
        UserError: the names are of no known library; or a tensor is missing, not needed, of another shape or not
            floating-point.
    """
    found = find_scheme(family, held)
    if found is None:
        libraries = " or ".join(sorted({name.split()[0].rstrip(",") for name in SCHEMES[family]}))
        raise UserError(
            f"{source}: its tensors do not have the names that {libraries} gives this network; {WRONG_FILE}"
        )
    scheme, prefix = found
    for name in _unselected(held, scheme, prefix, shapes):
        raise UserError(f"{source}: tensor {name} is not part of this network; {WRONG_FILE}")
    parts = {name: [prefix + part for part in scheme.parts(name)] for name in shapes}
    needed = {part: (shapes[name][0] // len(of), *shapes[name][1:]) for name, of in parts.items() for part in of}
    with_class = False
    if "pos_embed" in shapes:
        (positions,), (rows, width) = parts["pos_embed"], shapes["pos_embed"]
        with_class = positions in held and "cls_token" in shapes and held[positions].size == (rows + 1) * width
        needed[positions] = (rows + with_class, width)
    values = select_tensors(_shaped(held, needed, family), needed, source)
    selected = {
        name: values[of[0]] if len(of) == 1 else np.concatenate([values[part] for part in of])
        for name, of in parts.items()
    }
    if with_class:
        selected["cls_token"] = selected["cls_token"] + selected["pos_embed"][0]
        selected["pos_embed"] = selected["pos_embed"][1:]
    return selected


def _unselected(held: Iterable[str], scheme: Scheme, prefix: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The tensors of a file that change what the image encoder computes, but that the network does not have."""
    needed = {prefix + part for name in shapes for part in scheme.parts(name)}
    blocks = next(name for name in shapes if name.startswith(("blocks.", "stages.")))
    start = (prefix + scheme.name(blocks)).partition("0.")[0]
    tokens = {prefix + scheme.name(name) for name in ("cls_token", "reg_token", "pos_embed", "norm_pre.weight")}
    for name in held:
        if name not in needed and (name.startswith(start) or name in tokens):
            yield name


def _shaped(
    held: Mapping[str, np.ndarray], needed: Mapping[str, tuple[int, ...]], family: SchemeFamily
) -> dict[str, np.ndarray]:
    """The needed tensors that a file holds, without its own axes of size 1, and the biases that DINOv3 does without."""
    shaped = {}
    for name, shape in needed.items():
        if name in held:
            value = held[name]
            same = [size for size in value.shape if size > 1] == [size for size in shape if size > 1]
            shaped[name] = value.reshape(shape) if same else value
        elif family == "dinov3" and re.search(r"(k_proj\.|[qkv]_)bias$", name):
            shaped[name] = np.zeros(shape, np.float32)
    return shaped
