"""Attention as pure functions of arrays: no parameters, no configuration.

Layouts are [B, T, N, H] for queries and [B, S, K, H] for keys and values, K dividing N. Ops with several implementations
take `implementation=`; `explain(op, ...)` says which one runs and why.
"""

from attnlab.ops import block_index, dispatch, kmeans, select, sharding
from attnlab.ops.alibi import alibi_slopes
from attnlab.ops.bilevel_routing import bilevel_routing_attention, ragged_bilevel_routing_attention
from attnlab.ops.block_attention import block_attention
from attnlab.ops.dispatch import explain
from attnlab.ops.grassmann import grassmann_features, grassmann_projection
from attnlab.ops.kmeans_attention import kmeans_attention
from attnlab.ops.linear_scan import gated_delta_scan, gated_linear_scan
from attnlab.ops.local_attention import local_attention
from attnlab.ops.magnitude_aware import magnitude_aware_attention
from attnlab.ops.mixture_of_heads import mixture_of_heads_attention
from attnlab.ops.neural_memory import neural_memory
from attnlab.ops.relative_bias import relative_bias
from attnlab.ops.rotary import rotary
from attnlab.ops.routing import causal_routing_attention, routing_attention
from attnlab.ops.row_sparse import row_sparse_scan
from attnlab.ops.shifted import shifted_attention
from attnlab.ops.sigmoid import sigmoid_attention
from attnlab.ops.softmax import softmax_attention
from attnlab.ops.sparse_state import sparse_state_attention
from attnlab.ops.topk_attention import topk_attention
from attnlab.ops.weights import attention_weights

__all__ = [
    "alibi_slopes",
    "attention_weights",
    "bilevel_routing_attention",
    "block_attention",
    "block_index",
    "causal_routing_attention",
    "dispatch",
    "explain",
    "gated_delta_scan",
    "gated_linear_scan",
    "grassmann_features",
    "grassmann_projection",
    "kmeans",
    "kmeans_attention",
    "local_attention",
    "magnitude_aware_attention",
    "mixture_of_heads_attention",
    "neural_memory",
    "ragged_bilevel_routing_attention",
    "relative_bias",
    "rotary",
    "routing_attention",
    "row_sparse_scan",
    "select",
    "sharding",
    "shifted_attention",
    "sigmoid_attention",
    "softmax_attention",
    "sparse_state_attention",
    "topk_attention",
]
