"""Which implementation runs, and the reasons of the others."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import dispatch

BIG = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """A cuDNN of this version, as on a machine that has one."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


def explain(platform, *arrays, **options):
    with dispatch.target(platform):
        return ops.explain(ops.softmax_attention, *(arrays or (BIG, KV, KV)), **options)


def test_explain_is_readable_and_computes_nothing():
    decision = ops.explain("softmax_attention", BIG, KV, KV, causal=True)
    assert (decision.op, decision.platform, decision.chosen) == ("softmax_attention", "cpu", "xla")
    lines = str(decision).splitlines()
    assert lines[0].startswith("softmax_attention on cpu") and "xla" in lines[0]
    assert "  not cudnn: runs on gpu, and this is cpu" in lines
    assert "  not splash: runs on tpu, and this is cpu" in lines


def test_platforms_have_their_kernels():
    assert explain("tpu", causal=True).chosen == "splash"
    assert explain("tpu", causal=True, window=64).chosen == "splash"
    assert explain("gpu", causal=True, window=64).chosen == "cudnn"
    assert dispatch.target_platform() == "cpu"
    with dispatch.target("gpu", device_kind="NVIDIA H100"):
        assert (dispatch.target_platform(), dispatch.target_device_kind()) == ("gpu", "NVIDIA H100")
    with pytest.raises(ConfigError, match=r"unknown platform 'gpus'.*'gpu'"), dispatch.target("gpus"):
        pass


def test_long_sequences_go_in_chunks():
    long = jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.float32)
    decision = ops.explain(ops.softmax_attention, long, long, long)
    assert decision.chosen == "xla_chunked"
    assert "MiB" in decision.reasons["xla"]


@pytest.mark.parametrize(
    ("platform", "name", "options", "reason"),
    [
        ("tpu", "splash", {"alibi_slopes": jnp.ones(4)}, "does not do ALiBi"),
        ("tpu", "splash", {"mask": jnp.ones((1024, 1024), bool)}, "a dense mask"),
        ("tpu", "splash", {"q_positions": jnp.zeros((2, 1024), jnp.int32)}, "explicit positions"),
        ("tpu", "splash", {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0), "deterministic": False}, "dropout"),
        ("gpu", "cudnn", {"window": (64, 8)}, "windows only to the left"),
        ("gpu", "cudnn", {"q_segment_ids": jnp.zeros((2, 1024), jnp.int32)}, "segment ids"),
        ("gpu", "cudnn", {"kv_mask": jnp.ones((2, 1024), bool)}, "a padding mask"),
        ("gpu", "splash", {}, "runs on tpu, and this is gpu"),
        ("cpu", "cudnn", {}, "runs on gpu, and this is cpu"),
    ],
)
def test_a_named_implementation_refuses_and_never_falls_back(platform, name, options, reason):
    with pytest.raises(NotImplementedError, match=reason) as raised:
        explain(platform, implementation=name, **options)
    assert name in str(raised.value)
    decision = explain(platform, **options)
    assert decision.chosen != name
    assert reason in decision.reasons.get(name, reason)  # unless another one was taken before


def test_refusals_by_type_and_shape():
    narrow = [jax.ShapeDtypeStruct((2, 1024, 4, 60), jnp.bfloat16)] * 3
    assert "multiple of 8" in explain("gpu", *narrow).reasons["cudnn"]
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (BIG, KV, KV)]
    assert "float16 and bfloat16" in explain("gpu", *wide).reasons["cudnn"]
    assert "float32" in explain("tpu", *wide).reasons["splash"]
    assert explain("tpu", *wide, implementation="splash").chosen == "splash"
    short = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)
    assert "fewer than 128 queries" in explain("tpu", short, KV, KV, causal=True).reasons["splash"]
    more = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    assert "T <= S" in explain("tpu", more, KV, KV, causal=True).reasons["splash"]
    assert "T == S" in explain("gpu", more, KV, KV, causal=True).reasons["cudnn"]


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown implementation 'xla_chunk' of softmax_attention.*'xla_chunked'"):
        explain("cpu", implementation="xla_chunk")
    with pytest.raises(ConfigError, match=r"unknown op 'softmax_atention'.*'softmax_attention'"):
        ops.explain("softmax_atention", BIG, KV, KV)


def test_tables_are_open_and_decisions_recorded():
    def twice(x):
        return 2 * x

    dispatch.register("test_op", "plain", dispatch.Implementation(lambda x: x))
    dispatch.register("test_op", "absent", "no_such_package.kernels:IMPLEMENTATION", before="plain")
    even = dispatch.Implementation(twice, refuse=lambda x: "odd length" if x.size % 2 else None)
    dispatch.register("test_op", "even", even, before="plain", platforms=("cpu",))
    assert list(dispatch.implementations("test_op")) == ["absent", "even", "plain"]
    with dispatch.record() as decisions:
        assert dispatch.call("test_op", None, jnp.ones(2)).tolist() == [2, 2]
        assert dispatch.call("test_op", None, jnp.ones(1)).tolist() == [1]
    assert [decision.chosen for decision in decisions] == ["even", "plain"]
    assert decisions[1].reasons["even"] == "odd length"
    assert "no_such_package" in decisions[1].reasons["absent"]
    with pytest.raises(NotImplementedError, match="odd length"):
        dispatch.call("test_op", "even", jnp.ones(1))
    dispatch.register("test_op", "plain", dispatch.Implementation(lambda x: x, refuse=lambda x: "never"))
    with pytest.raises(NotImplementedError, match=r"no implementation.*odd length.*never"):
        dispatch.call("test_op", None, jnp.ones(1))
