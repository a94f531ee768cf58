"""Mixers of the linear families where a mesh splits the sequence: the numbers of one device, forward and backward."""

import json

SPLIT = """
import json, os
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from attnlab import nn as mixers
from attnlab.training.config import SHARDING_RULES

B, T, D = 2, 32, 8
ALL, SOME = {"context": 8}, {"data": 2, "context": 4}
sizes = {"dim": D, "num_heads": 2}
memory = {"chunk_size": 8, "memory_expansion": 2.0}
CASES = {
    "magnitude aware": (mixers.MagnitudeAwareAttention(**sizes, chunk_size=4), ALL),
    "sparse states, sorted": (mixers.SparseStateExpansion(**sizes, chunk_size=4, implementation="varlen"), ALL),
    # Offsets that reach over one border and over two.
    "grassmann": (mixers.GrassmannMixing(D, reduced_dim=4, offsets=(1, 3, 6)), ALL),
    # Its convolution and its documents cross borders.
    "titans lmm": (mixers.TitansLMM(**sizes, **memory, memory_depth=1, conv_width=4), ALL),
    "titans mac": (mixers.TitansMAC(**sizes, **memory, num_persistent=2), SOME),
    "titans mag": (mixers.TitansMAG(**sizes, **memory, memory_depth=1, window=7, num_persistent=0), SOME),
}
WHOLE = ("titans mac", "titans mag")  # one document per row: what packing does to their memory is that of LMM
rng = np.random.default_rng(0)
x = rng.standard_normal((B, T, D), np.float32)
# Documents end inside a device's part and at its border, padding lies between and behind.
segments = np.repeat([[1, 2, 0, 3, 0], [1, 2, 3, 0, 4]], [8, 5, 2, 14, 3], axis=1)

errors = {}
for name, (mixer, mesh) in CASES.items():
    shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))["params"]  # numbers of numpy: nothing to compile
    params = {"params": jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape, np.float32), shapes)}

    def step(params, x, segments):
        documents = None if name in WHOLE else segments
        y, pullback = jax.vjp(lambda params, x: mixer.apply(params, x, segment_ids=documents)[0], params, x)
        return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    want = jax.jit(step)(params, x, segments)
    mesh = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    spec = PartitionSpec("data" if "data" in mesh.shape else None, "context")
    with jax.set_mesh(mesh), nn.logical_axis_rules(SHARDING_RULES):
        place = NamedSharding(mesh, spec)
        have = jax.jit(step)(params, *(jax.device_put(array, place) for array in (x, segments)))
    assert have[0].sharding.is_equivalent_to(place, 3), (name, have[0].sharding)
    pairs = list(zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (have, want)), strict=True))
    errors[name] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
print(json.dumps(errors))
"""


def test_a_split_sequence_equals_a_whole_one(run_python):
    errors = json.loads(run_python(["-c", SPLIT], devices=8, timeout=600, quickly=True).stdout.splitlines()[-1])
    assert len(errors) == 6
    assert max(errors.values()) < 1e-4, errors
