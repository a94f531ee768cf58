import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.flops import count_flops
from attnlab.models.vit import ViT
from attnlab.ops import dispatch
from attnlab.training import costs, hlo

RATES = costs.Rates(flops=1e12, bandwidth=1e11)


def cost_of(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())
    return costs.program_cost(module, 1, RATES, **options)


def program(lines, parameters="x: f32[4]"):
    body = "\n".join("  " + line for line in lines)
    return hlo.parse(f"ENTRY %main ({parameters}) -> f32[4] {{\n{body}\n}}\n")


def test_a_scanned_model_costs_what_its_layers_cost():
    batch, width, layers = 24, 40, 7

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2)

    forward = 2 * batch * width * width * layers
    cost = cost_of(loss, (layers, width, width), (batch, width))
    assert cost.flops == forward
    # backward: two products per layer; XLA computes the gradient of the first input too unless nobody asks for it
    backward = cost_of(jax.grad(loss, argnums=(0, 1)), (layers, width, width), (batch, width))
    assert backward.flops == 3 * forward
    assert backward.bytes > 2 * layers * width * width * 4
    assert not backward.notes


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_model_counted_from_its_trace_from_its_program_and_by_xla(scan_layers):
    options = {"softmax": {"causal": False, "rope": False, "proj_bias": True}}
    sizes = {"dim": 512, "num_layers": 3, "num_heads": 8, "image_shape": (64, 64, 3), "num_classes": 10}
    model = ViT(**sizes, mixer_options=options, scan_layers=scan_layers)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    counted = count_flops(model.apply, variables, image)
    with dispatch.portable():
        lowered = jax.jit(model.apply).lower(variables, image)
    assert costs.program_cost(hlo.parse(lowered.compiler_ir("hlo").as_hlo_text()), 1, RATES).flops == counted
    if not scan_layers:  # XLA counts the body of a loop once, and elementwise work too
        assert counted < lowered.cost_analysis()["flops"] < 1.05 * counted


def test_nested_loops_multiply():
    def f(x, w):
        def inner(x, _):
            return x @ w, None

        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None), x, None, length=5)[0]

    assert cost_of(f, (8, 16), (16, 16)).flops == 15 * 2 * 8 * 16 * 16


def test_a_conditional_costs_its_dearest_branch():
    def f(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert cost_of(f, (8, 64), (64, 64)).flops == 2 * 2 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("window", "padding", "lhs_dilation", "rhs_dilation"),
    [((1,), [(0, 0)], (1,), (1,)), ((2,), [(1, 1)], (1,), (2,)), ((1,), [(2, 2)], (2,), (1,))],
)
def test_convolutions_count_products_that_exist(window, padding, lhs_dilation, rhs_dilation):
    batch, inputs, outputs, length, taps = 3, 4, 5, 9, 3

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, window, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
            dimension_numbers=("NCH", "OIH", "NCH"),
        )  # fmt: skip

    # the linear map has one coefficient per product: ones in, sum out counts them
    products = float(jnp.sum(convolve(jnp.ones((batch, inputs, length)), jnp.ones((outputs, inputs, taps)))))
    text = (
        jax.jit(convolve)
        .lower(jnp.ones((batch, inputs, length)), jnp.ones((outputs, inputs, taps)))
        .compiler_ir("hlo")
        .as_hlo_text()
    )
    module = hlo.parse(text)
    flops = [
        costs.convolution_flops(instruction, computation)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "convolution"
    ]
    assert flops == [2 * products]


@pytest.mark.parametrize(
    ("line", "kind", "payload", "wire"),
    [
        ("all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add", "all-reduce", 16, 24),
        ("all-to-all(%x), replica_groups=[1,4]<=[4]", "all-to-all", 16, 12),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,2}}", "collective-permute", 16, 16),
        ("collective-broadcast(%x), replica_groups={{0,1,2,3}}", "collective-broadcast", 16, 16),
    ],
)
def test_bytes_that_collectives_send(line, kind, payload, wire):
    module = program(["%x = f32[4]{0} parameter(0)", f"ROOT %r = f32[4]{{0}} {line}"])
    (found,) = costs.program_cost(module, 4, RATES).collectives
    assert (found.kind, found.payload, found.wire, found.count) == (kind, payload, wire, 1)


@pytest.mark.parametrize("form", ["sync", "started"])
def test_gathers_and_scatters_count_the_full_array(form):
    gather = "ROOT %r = f32[16]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}"
    if form == "started":
        gather = "ROOT %r = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}"
    module = program(["%x = f32[4]{0} parameter(0)", gather])
    (found,) = costs.program_cost(module, 4, RATES).collectives
    assert (found.kind, found.payload, found.wire) == ("all-gather", 64, 48)
    module = program(
        ["%x = f32[16]{0} parameter(0)", "ROOT %r = f32[4]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%a"]
    )
    (found,) = costs.program_cost(module, 4, RATES).collectives
    assert (found.payload, found.wire) == (64, 48)


def test_a_collective_spread_over_fusions_counts_once():
    line = "all-gather(%x), channel_id=3, replica_groups=[1,4]<=[4], backend_config={\"async_collective_fusion_config\":{}}"
    module = program(
        ["%x = f32[4]{0} parameter(0)", f"%a = f32[16]{{0}} {line}", f"%b = f32[16]{{0}} {line}", "ROOT %c = f32[4]{0} copy(%x)"]
    )
    assert len(costs.program_cost(module, 4, RATES).collectives) == 1


def test_kernels_state_their_flops_or_are_named():
    call = 'ROOT %mine.3 = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    silent = costs.program_cost(program(["%x = f32[4]{0} parameter(0)", call]), 1, RATES)
    assert silent.flops == 0
    assert silent.notes == {"kernel mine states no FLOPs: counted as none"}
    config = ', backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"321"}}}'
    stated = costs.program_cost(program(["%x = f32[4]{0} parameter(0)", call + config]), 1, RATES)
    assert (stated.flops, stated.kernel_flops, stated.notes) == (321, 321, set())


@pytest.mark.parametrize(
    ("name", "products"), [("splash_mha_fwd_residuals", 2), ("splash_mha_dq_no_residuals", 3), ("splash_mha_dkv", 4)]
)
def test_attention_kernels_are_counted_from_shapes(name, products):
    batch, heads, kv_heads, queries, keys, width = 2, 8, 4, 16, 32, 64
    module = program(
        [
            "%m = s8[1,4,4]{2,1,0} parameter(0)",
            f"%q = bf16[{batch},{heads},{queries},{width}]{{3,2,1,0}} parameter(1)",
            f"%k = bf16[{batch},{kv_heads},{keys},{width}]{{3,2,1,0}} parameter(2)",
            f'ROOT %{name}.1 = bf16[4]{{0}} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"',
        ]
    )
    cost = costs.program_cost(module, 1, RATES, visible_pairs=0.5)
    assert cost.flops == products * 2 * batch * heads * queries * keys * width * 0.5


def test_traffic_counts_slices_and_updates_by_what_they_touch():
    module = hlo.parse("""
%fused (p0: f32[100,8], p1: s32[], p2: f32[1,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%p0, %p2, %p1, %p1)
}

ENTRY %main (a: f32[100,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[50,8]{1,0:S(1)} custom-call(%i), custom_call_target="AllocateBuffer"
  %s = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %f = f32[100,8]{1,0} fusion(%a, %i, %s), kind=kLoop, calls=%fused
}
""")
    # slice: 32 read, 32 written; update: 32 written, 32 + 4 read
    assert costs.program_cost(module, 1, RATES).bytes == 64 + 32 + 32 + 4


def test_time_is_the_slower_of_arithmetic_and_traffic_for_each_operation():
    cost = cost_of(lambda x, w: x @ w, (64, 64), (64, 64))
    np.testing.assert_allclose(cost.seconds, max(cost.flops / RATES.flops, cost.bytes / RATES.bandwidth))
