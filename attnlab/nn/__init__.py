"""Flax modules that map tokens to tokens, [B, T, D] to [B, T, D]; usable alone, without config or mesh."""

from attnlab.nn.block import Block
from attnlab.nn.mixer import KVCache
from attnlab.nn.mlp import GatedMLP, GeluMLP
from attnlab.nn.norm import LayerNorm, RMSNorm
from attnlab.nn.sigmoid import SigmoidAttention
from attnlab.nn.softmax import SoftmaxAttention

__all__ = ["Block", "GatedMLP", "GeluMLP", "KVCache", "LayerNorm", "RMSNorm", "SigmoidAttention", "SoftmaxAttention"]
