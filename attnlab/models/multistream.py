"""The multi-stream network of feature-selection gates (arXiv 2407.04400): a gated CNN for each kind of input.

    model = MultiStreamNet(outputs=1, streams=("rgb", "depth"))
    sizes = model.apply(variables, {"rgb": images, "depth": depth})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, field_error
from attnlab.models.options import from_options
from attnlab.nn.feature_gates import GATE, FeatureGate, scale_inputs
from attnlab.nn.projection import Projection
from attnlab.nn.vision import BatchNorm, Conv

STREAMS = ("rgb", "mask", "depth")  # in the order in which their features are joined


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), the block of ResNet-18 (He et al., 2015, arXiv 1512.03385).

    Parameters: `conv_1`, `norm_1`, `conv_2`, `norm_2`; `shortcut`, `shortcut_norm` where size or channels change.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, y, x, features]."""

        def conv(x: jax.Array, name: str, kernel: int, stride: int, norm: str) -> jax.Array:
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            x = Conv(self.features, (kernel, kernel), stride, use_bias=False, name=name, **types)(x)
            return BatchNorm(param_dtype=self.param_dtype, name=norm)(x, deterministic=deterministic)

        y = nn.relu(conv(x, "conv_1", 3, self.stride, "norm_1"))
        y = conv(y, "conv_2", 3, 1, "norm_2")
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(x, "shortcut", 1, self.stride, "shortcut_norm")
        return nn.relu(y + x)


class GatedBranch(nn.Module):
    """A stem and four stages, a gate after each stage whose result feeds the next one; then the mean over the map.

    Parameters: `stem`, `stage_{i}` ..., `gate_{i}`, i = 1 .. 4.

    Attributes:
        kind: "resnet18", or "plain": one 3x3 convolution without bias and a ReLU for the stem and for each stage.
        stem_width: channels of the stem.
        widths: channels of the stages.
        gates: without them it is the plain backbone.
        gate_init: as of `FeatureGate`.
    """

    kind: str = "resnet18"
    stem_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    gates: bool = True
    gate_init: str = "xavier"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, widths[-1]].

        Raises:
            ConfigError: unknown kind.
        """
        if self.kind not in ("plain", "resnet18"):
            raise ConfigError(f"branch = {self.kind!r}: unknown. Use 'resnet18' or 'plain'.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = self.kind == "plain"
        size, stride = ((3, 3), 1) if plain else ((7, 7), 2)
        x = Conv(self.stem_width, size, stride, use_bias=False, name="stem", **types)(x)
        if not plain:
            x = BatchNorm(param_dtype=self.param_dtype, name="stem_norm")(x, deterministic=deterministic)
        x = nn.relu(x)
        if not plain:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, width in enumerate(self.widths, 1):
            if plain:
                x = nn.relu(Conv(width, (3, 3), use_bias=False, name=f"stage_{i}", **types)(x))
            else:
                for j in range(2):
                    block = BasicBlock(width, 2 if i > 1 and j == 0 else 1, name=f"stage_{i}_{j}", **types)
                    x = block(x, deterministic=deterministic)
            if self.gates:
                x = FeatureGate(self.gate_init, self.param_dtype, name=f"gate_{i}")(x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)


class MultiStreamNet(nn.Module):
    """fc3(s(g_2) relu(fc2(s(g_1) e))), e the joined features of the streams' branches in the order rgb, mask, depth.

    Parameters: `rgb`, `mask`, `depth` (`GatedBranch`, of the streams there are), `embed_gate`, `fc2`, `hidden_gate`, `fc3`;
    running statistics in the collection `batch_stats`.

    Attributes:
        outputs: of fc3.
        streams: which there are, of "rgb" (3 channels), "mask" (masked rgb, 3) and "depth" (1).
        branch: kind of `GatedBranch`.
        stem_width: of the branches.
        widths: alike.
        hidden: width between fc2 and fc3.
        gates: without them it is the plain network, for comparisons and for folded parameters.
        gate_init: as of `FeatureGate`.
    """

    outputs: int = 1
    streams: tuple[str, ...] = ("rgb",)
    branch: str = "resnet18"
    stem_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    hidden: int = 512
    gates: bool = True
    gate_init: str = "xavier"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, num_classes: int, image_shape: tuple[int, int, int]) -> MultiStreamNet:
        """Builds the module from `config.model`; a data set of images is one stream."""
        del image_shape
        if len(model.streams) != 1:
            raise field_error("config.model.streams", tuple(model.streams), "a data set of images is one stream", "Name one")
        return from_options(cls, model, outputs=num_classes)

    @nn.compact
    def __call__(self, inputs: jax.Array | Mapping[str, jax.Array], *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, C] by stream (or those of the only stream) to [B, outputs] float32.

        Raises:
            ConfigError: unknown streams, or inputs of others than `streams`.
        """
        unknown = sorted(set(self.streams) - set(STREAMS))
        if unknown or not self.streams:
            raise ConfigError(f"streams = {tuple(self.streams)}: choose some of {', '.join(STREAMS)}.")
        if not isinstance(inputs, Mapping):
            inputs = {self.streams[0]: inputs}
        if set(inputs) != set(self.streams):
            raise ConfigError(f"inputs of {sorted(inputs)}: the model has the streams {sorted(self.streams)}.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gates = {"gates": self.gates, "gate_init": self.gate_init}
        features = [
            GatedBranch(self.branch, self.stem_width, tuple(self.widths), name=name, **gates, **types)(
                inputs[name].astype(self.dtype), deterministic=deterministic
            )
            for name in STREAMS
            if name in inputs
        ]
        x = self._gated(jnp.concatenate(features, axis=-1), "embed_gate")
        x = Projection((x.shape[-1], self.hidden), ("embed", "mlp"), use_bias=True, name="fc2", **types)(x)
        x = self._gated(nn.relu(x), "hidden_gate")
        x = Projection((self.hidden, self.outputs), ("mlp", "vocab"), use_bias=True, name="fc3", **types)(x)
        return x.astype(jnp.float32)

    def _gated(self, x: jax.Array, name: str) -> jax.Array:
        return FeatureGate(self.gate_init, self.param_dtype, name=name)(x) if self.gates else x


def fold_gates(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters of a `MultiStreamNet` for the same one with `gates=False`: the output stays.

    A gate goes into the kernels that read what it gates: the first convolutions (and the shortcut) of the next stage, fc2
    for the last stage of each stream and the joined features, fc3 for the hidden layer. Unboxed parameters.
    """
    folded = {name: dict(value) for name, value in params.items() if not name.endswith("_gate")}
    joined = []
    for stream in (name for name in STREAMS if name in params):
        branch = {name: value for name, value in params[stream].items() if not name.startswith("gate_")}
        last = sum(name.startswith("gate_") for name in params[stream])
        for i in range(1, last):
            gate = params[stream][f"gate_{i}"][GATE]
            if f"stage_{i + 1}" in branch:
                branch[f"stage_{i + 1}"] = _read_gated(branch[f"stage_{i + 1}"], gate)
            else:
                block = dict(branch[f"stage_{i + 1}_0"])
                block |= {name: _read_gated(block[name], gate) for name in ("conv_1", "shortcut")}
                branch[f"stage_{i + 1}_0"] = block
        joined.append(params[stream][f"gate_{last}"][GATE])
        folded[stream] = branch
    for gate in (jnp.concatenate(joined), params["embed_gate"][GATE]):
        folded["fc2"] = _read_gated(folded["fc2"], gate)
    folded["fc3"] = _read_gated(folded["fc3"], params["hidden_gate"][GATE])
    return folded


def _read_gated(layer: Mapping[str, jax.Array], gate: jax.Array) -> dict[str, jax.Array]:
    return {**layer, "kernel": scale_inputs(layer["kernel"], gate)}
