"""Attention as pure functions of arrays: no parameters, no configuration.

Layouts are [B, T, N, H] for queries and [B, S, K, H] for keys and values, K dividing N. Every op takes
`implementation=`; `explain(op, ...)` says which one runs and why.
"""

from attnlab.ops import block_index, dispatch, select, sharding
from attnlab.ops.alibi import alibi_slopes
from attnlab.ops.block_attention import block_attention
from attnlab.ops.dispatch import explain
from attnlab.ops.rotary import rotary
from attnlab.ops.sigmoid import sigmoid_attention
from attnlab.ops.softmax import softmax_attention
from attnlab.ops.weights import attention_weights

__all__ = [
    "alibi_slopes",
    "attention_weights",
    "block_attention",
    "block_index",
    "dispatch",
    "explain",
    "rotary",
    "select",
    "sharding",
    "sigmoid_attention",
    "softmax_attention",
]
