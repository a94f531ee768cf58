import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.training import hlo

LOOP = """HloModule jit_f, is_scheduled=true

%fused_compare (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p0, %p1), direction=LT
}

%condition (arg: (s32[], f32[8,8])) -> pred[] {
  %arg = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(BOUND)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %compare = pred[] CONDITION
}

%body (arg.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %arg.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %step = s32[] constant(STEP)
  %next = s32[] add(%i.1, %step)
  %x = f32[8,8]{1,0} get-tuple-element(%arg.1), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="a, (b)=c"}
  ROOT %tuple = (s32[], /*index=1*/f32[8,8]{1,0}) tuple(%next, %y)
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %start = s32[] constant(START)
  %copied = s32[] copy(%start)
  %init = (s32[], f32[8,8]{1,0}) tuple(%copied, %x.1)
  %while = (s32[], f32[8,8]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%while), index=1
}
"""


def trips(bound, start, step, condition="compare(%i, %bound), direction=LT"):
    text = LOOP.replace("BOUND", str(bound)).replace("START", str(start)).replace("STEP", str(step))
    module = hlo.parse(text.replace("CONDITION", condition))
    main = module.computations[module.entry]
    return module.trip_count(main.instructions["while"], main)


@pytest.mark.parametrize(
    ("bound", "start", "step", "condition", "expected"),
    [
        (12, 0, 1, "compare(%i, %bound), direction=LT", 12),
        (12, 3, 1, "compare(%i, %bound), direction=LT", 9),
        (12, 0, 5, "compare(%i, %bound), direction=LT", 3),
        (12, 0, 1, "compare(%i, %bound), direction=LE", 13),
        (12, 0, 1, "compare(%bound, %i), direction=GT", 12),
        (12, 0, 1, "fusion(%i, %bound), kind=kLoop, calls=%fused_compare", 12),
        (12, 0, 1, "custom-call(%i, %bound), custom_call_target=\"x\"", None),
        (0, 0, 1, "compare(%i, %bound), direction=LT", 0),
    ],
)
def test_trip_counts_without_annotation(bound, start, step, condition, expected):
    assert trips(bound, start, step, condition) == expected


def test_the_annotation_wins():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"},"other":{"a":"}"}}')
    module = hlo.parse(text.replace("CONDITION", "compare(%i, %bound), direction=LT"))
    main = module.computations[module.entry]
    assert module.trip_count(main.instructions["while"], main) == 7


def test_instructions_are_read_with_shapes_operands_and_attributes():
    module = hlo.parse(LOOP)
    assert module.entry == "main"
    assert set(module.computations) == {"fused_compare", "condition", "body", "main"}
    dot = module.computations["body"].instructions["y"]
    assert (dot.opcode, dot.operands, dot.arrays) == ("dot", ("x", "x"), (hlo.Array("f32", (8, 8)),))
    assert dot.attribute("lhs_contracting_dims") == "{1}"
    assert dot.attribute("metadata") == '{op_name="a, (b)=c"}'
    assert module.computations["condition"].instructions["arg"].arrays[1].space == 1
    assert module.computations["body"].root.operands == ("next", "y")
    assert module.computations["body"].parameters[0].name == "arg.1"


def test_attributes_may_hold_line_breaks():
    text = (
        "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        '  ROOT %k = f32[4]{0} custom-call(%x), custom_call_target="t", frontend_attributes={kernel_metadata={\n'
        '"note":"1"\n}}, backend_config={"a":{"b":"2"}}\n}\n'
    )
    kernel = hlo.parse(text).computations["main"].root
    assert kernel.backend_config == {"a": {"b": "2"}}


@pytest.mark.parametrize(
    ("text", "size"),
    [("f32[8,128]{1,0:T(8,128)}", 4096), ("(bf16[2,3], s32[])", 16), ("pred[5]", 5), ("s4[8]", 4), ("f8e4m3fn[4]", 4)],
)
def test_bytes_of_shapes(text, size):
    assert sum(array.bytes for array in hlo.parse_shape(text)) == size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4,'b'=1] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("{{0},{1,2,3}}", None),
    ],
)
def test_replica_groups_in_every_notation(text, expected):
    line = f"  ROOT %r = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, use_global_device_ids=true\n"
    module = hlo.parse("ENTRY %m (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n" + line + "}\n")
    found = hlo.replica_groups(module.computations["m"].root, 4)
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, expected)


def test_a_real_program_is_read():
    def f(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((6, 32, 32), jnp.float32)
    module = hlo.parse(jax.jit(f).lower(*shapes).compile().as_text())
    loops = [
        module.trip_count(instruction, computation)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]
    assert loops == [6]
