"""The analysis of compiled programs, on programs whose arithmetic and traffic are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from imgcap_jax.loops import loop_name, named_loop
from imgcap_jax.plan.hlo import Analysis, analyse
from imgcap_jax.plan.hlo_text import parse, shapes

A, B = jnp.ones((8, 16)), jnp.ones((16, 16))
ONE = 2 * 8 * 16 * 16  # FLOPs of A @ B


def compiled(function: Any, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def analysis_of(function: Any, *arguments: Any, **options: Any) -> Analysis:
    return analyse(compiled(function, *arguments).as_text(), **options)


@pytest.mark.parametrize(
    ("left", "right"),
    [((8, 16), "ik,kj->ij"), ((4, 8, 16), "bik,kj->bij"), ((16, 8), "ki,kj->ij")],
)
def test_products_equal_the_analysis_of_xla(left: tuple[int, ...], right: str) -> None:
    program = compiled(lambda a, b: jnp.einsum(right, a, b), jnp.ones(left), B)
    found = analyse(program.as_text())
    assert found.flops == 2 * 16 * np.prod(left)
    assert found.flops == program.cost_analysis()["flops"]


def test_a_batch_of_products() -> None:
    found = analysis_of(lambda a, b: jnp.einsum("bmn,bnd->bmd", a, b), jnp.ones((4, 5, 6)), jnp.ones((4, 6, 7)))
    assert found.flops == 2 * 4 * 5 * 6 * 7


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("dilation", [{}, {"lhs_dilation": (2, 3)}, {"rhs_dilation": (2, 1)}])
def test_convolutions_equal_the_analysis_of_xla(stride: int, padding: str, dilation: dict[str, Any]) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        around = [(2, 1), (0, 2)] if dilation else padding
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=layout, **dilation)

    program = compiled(convolve, jnp.ones((2, 9, 8, 3)), jnp.ones((3, 3, 3, 4)))
    found = analyse(program.as_text())
    assert found.flops > 0
    assert found.flops == program.cost_analysis()["flops"]


def test_a_grouped_convolution() -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout, feature_group_count=6)

    assert analysis_of(convolve, jnp.ones((2, 9, 8, 6)), jnp.ones((3, 3, 1, 6))).flops == 2 * (2 * 7 * 6 * 6) * 9


def scanned(a: jax.Array, b: jax.Array, length: int) -> jax.Array:
    return lax.scan(lambda a, _: (jnp.tanh(a @ b), None), a, None, length)[0]


def test_loops_multiply() -> None:
    found = analysis_of(lambda a, b: scanned(a, b, 7), A, B)
    assert found.flops == 7 * ONE
    nested = lax.scan
    found = analysis_of(
        lambda a, b: nested(lambda a, _: (scanned(a, b, 3) + 1, None), a, None, 5)[0],
        A,
        B,
    )
    assert found.flops == 15 * ONE
    found = analysis_of(lambda a, b: lax.fori_loop(2, 12, lambda i, a: jnp.tanh(a @ b) * i, a), A, B)
    assert found.flops == 10 * ONE
    assert not found.unknown_loops


def test_the_condition_of_a_loop_is_read_if_xla_states_no_length() -> None:
    text = compiled(lambda a, b: scanned(a, b, 7), A, B).as_text()
    assert '"known_trip_count":{"n":"7"}' in text
    text = text.replace('"known_trip_count":{"n":"7"}', '"other":{"n":"9"}')
    assert analyse(text).flops == 7 * ONE


@pytest.mark.parametrize(
    ("condition", "trips"),
    [
        ("compare(%i, %n), direction=LT", 6),
        ("compare(%n, %i), direction=GT", 6),
        ("compare(%i, %n), direction=LE", 7),
        ("compare(%n, %i), direction=GE", 7),
        ("compare(%n, %i), direction=LT", 1),  # not known, counted once
    ],
)
def test_conditions_are_read_in_both_orders(condition: str, trips: int) -> None:
    assert TPU.count("compare(%i, %n), direction=LT") == 1
    (product,) = (one for one in analyse(TPU.replace("compare(%i, %n), direction=LT", condition)).work if one.flops)
    assert product.count == trips


def until_large(a: jax.Array, b: jax.Array) -> jax.Array:
    with named_loop("search"):
        return lax.while_loop(lambda a: a.sum() < 1e30, lambda a: a @ b + 1, a)


def test_loops_of_unknown_length_are_assumed_by_name() -> None:
    names = []

    def trips(name: str) -> int | None:
        names.append(loop_name(name))
        return 13

    assert analysis_of(until_large, A, B, trips=trips).flops == 13 * ONE
    assert names == ["search"]
    unknown = analysis_of(until_large, A, B)
    assert unknown.flops == ONE
    assert [loop_name(name) for name in unknown.unknown_loops] == ["search"]
    assert loop_name("jit(step)/while/body/dot") is None


def test_the_largest_branch_counts() -> None:
    def branches(n: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.switch(
            n,
            [lambda: a, lambda: a @ b @ b @ b, lambda: a @ b],
        )

    assert analysis_of(branches, jnp.int32(0), A, B).flops == 3 * ONE


def test_collectives_count_the_bytes_of_one_device() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

    def step(a: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3, lambda _, a: lax.psum(a, "x") * 0.5, a)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = analysis_of(mapped, A).by_collective()
    assert list(found) == ["all-reduce"]
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (3, 3 * A.nbytes)

    gather = jax.shard_map(
        lambda a: lax.all_gather(a, "x"),
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec("x"),
        check_vma=False,
    )
    assert analysis_of(gather, A).by_collective()["all-gather"].bytes == A.nbytes / 4


def test_host_callbacks_are_found() -> None:
    def step(a: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(a.shape, a.dtype), a)

    assert len(analysis_of(step, A).host) == 1
    assert not analysis_of(jnp.sin, A).host


def test_traffic_of_an_elementwise_program() -> None:
    x = jnp.ones((256, 256))
    assert analysis_of(lambda x: jnp.tanh(x) + 1, x).bytes == 2 * x.nbytes


def test_slices_and_updates_in_place_move_only_their_part() -> None:
    table, row = jnp.ones((1024, 256)), jnp.ones((1, 256))

    def read(table: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(table, i, 1) * 2

    assert analysis_of(read, table, jnp.int32(3)).bytes < 3 * row.nbytes

    def write(table: jax.Array, row: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 10, lambda i, table: lax.dynamic_update_slice_in_dim(table, row * i, i, 0), table)

    donated = jax.jit(write, donate_argnums=0).lower(table, row).compile()
    assert analyse(donated.as_text()).bytes < 2 * 10 * 4 * row.nbytes + 3 * table.nbytes


def test_shapes_with_the_layouts_of_tpus() -> None:
    (shape,) = shapes("bf16[21,32,5,49]{1,3,2,0:T(8,128)(2,1)}")
    assert (shape.dims, shape.order, shape.tile, shape.space) == ((21, 32, 5, 49), (1, 3, 2, 0), (8, 128), 0)
    assert shape.padded_bytes == 21 * 5 * 56 * 128 * 2
    on_chip, flags = shapes("(f32[512]{0:T(512)S(1)}, u32[]{:S(2)})")
    assert (on_chip.main_bytes, on_chip.padded_bytes, flags.space) == (0, 2048, 2)
    assert shapes("pred[7]{0}")[0].bytes == 7
    assert shapes("s4[3,3]")[0].bytes == 5


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry"):
        parse("HloModule empty")


TPU = """HloModule step
%region (p: (s32[], f32[128,128])) -> (s32[], f32[128,128]) {
  %p = (s32[]{:T(128)}, f32[128,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %a = f32[128,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %dot = f32[128,128]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_io->bf, operand_precision={highest,highest}, @
  ROOT %t = (s32[]{:T(128)}, f32[128,128]{1,0:T(8,128)}) tuple(%next, %dot)
}
%condition (p: (s32[], f32[128,128])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[128,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
ENTRY %main (x: f32[128,128]) -> f32[128,128] {
  %x = f32[128,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[128,128]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[128,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%region
  ROOT %result = f32[128,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
""".replace("@", 'backend_config={"window_config":{"estimated_cycles":"500"}}')


def test_a_program_of_the_tpu_compiler() -> None:
    """Products are convolutions, loops state no length, and instructions have estimates of cycles."""
    found = analyse(TPU)
    (product,) = (one for one in found.work if one.flops)
    assert (product.count, product.passes, product.cycles) == (6, 6, 3000)
    assert product.flops == 6 * 2 * 128**3


SHAPE = "f32[128]{0:T(128)}"
FUSED = """HloModule step
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
%start (p: f32[128]) -> (f32[128], f32[128]) {
  %p = @ parameter(0)
  ROOT %r = (@, @) all-reduce-start(%p), channel_id=7, replica_groups=GROUPS, to_apply=%sum
}
%between (p: f32[128], q: f32[128]) -> f32[128] {
  %p = @ parameter(0)
  %q = @ parameter(1)
  %r = @ all-reduce(%p), channel_id=7, replica_groups=GROUPS, to_apply=%sum
  ROOT %s = @ add(%r, %q)
}
%other (p: f32[128]) -> f32[64] {
  %p = @ parameter(0)
  ROOT %r = f32[64]{0:T(128)} reduce-scatter(%p), channel_id=8, replica_groups={{0,2},{1,3}}, to_apply=%sum
}
ENTRY %main (x: f32[128]) -> f32[64] {
  %x = @ parameter(0)
  %f = (@, @) fusion(%x), kind=kCustom, calls=%start
  %g = @ get-tuple-element(%f), index=0
  %h = @ fusion(%g, %x), kind=kCustom, calls=%between
  ROOT %i = f32[64]{0:T(128)} fusion(%h), kind=kCustom, calls=%other
}
""".replace("@", SHAPE)


@pytest.mark.parametrize(
    ("groups", "name", "group"),
    [
        ("{{0,1,2,3}}", "all-reduce", ()),
        ("{}", "all-reduce", ()),
        ("[1,4]<=[4]", "all-reduce", ()),
        ("{{0,1},{2,3}}", "all-reduce among 2", (0, 1)),
        ("[2,2]<=[4]", "all-reduce among 2", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", "all-reduce among 2", (0, 2)),
    ],
)
def test_collectives_within_fusions_count_once(groups: str, name: str, group: tuple[int, ...]) -> None:
    found = analyse(FUSED.replace("GROUPS", groups)).by_collective()
    assert list(found) == [name, "reduce-scatter among 2"]
    assert (found[name].count, found[name].bytes, found[name].group) == (1, 512, group)
    scattered = found["reduce-scatter among 2"]
    assert (scattered.count, scattered.bytes, scattered.group) == (1, 512, (0, 2))


SLICED = """HloModule step
ENTRY %main (x: f32[1280,512]) -> f32[320,512] {
  %x = f32[1280,512]{1,0:T(8,128)} parameter(0)
  %s = ((f32[1280,512]{1,0:T(8,128)}), f32[320,512]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:320]}
  ROOT %d = f32[320,512]{1,0:T(8,128)S(1)} slice-done(%s)
}
"""


def test_a_slice_that_is_fetched_ahead_moves_only_its_part() -> None:
    assert analyse(SLICED).bytes == 320 * 512 * 4
