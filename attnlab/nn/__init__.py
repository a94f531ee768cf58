"""Flax modules that map tokens to tokens, [B, T, D] to [B, T, D]; usable alone, without config or mesh."""

from attnlab.nn.bilevel_routing import BiLevelRoutingAttention
from attnlab.nn.block import Block
from attnlab.nn.feature_gates import FeatureGate
from attnlab.nn.gated_linear import GatedDeltaNet, GatedLinearAttention
from attnlab.nn.grassmann import GrassmannMixing
from attnlab.nn.kmeans_attention import KMeansAttention
from attnlab.nn.magnitude_aware import MagnitudeAwareAttention
from attnlab.nn.mixer import KVCache
from attnlab.nn.mixture_of_heads import MixtureOfHeads
from attnlab.nn.mlp import GatedMLP, GeluMLP
from attnlab.nn.norm import LayerNorm, RMSNorm
from attnlab.nn.routing import RoutingAttention
from attnlab.nn.segmented import SegmentedAttention
from attnlab.nn.shifted import S2Attention, SFAttention
from attnlab.nn.sigmoid import SigmoidAttention
from attnlab.nn.softmax import SoftmaxAttention
from attnlab.nn.sparse_state import SparseStateExpansion
from attnlab.nn.titans import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from attnlab.nn.titans_lucid import LucidMemory
from attnlab.nn.window_attention import WindowAttention

__all__ = [
    "BiLevelRoutingAttention",
    "Block",
    "FeatureGate",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedMLP",
    "GeluMLP",
    "GrassmannMixing",
    "KMeansAttention",
    "KVCache",
    "LayerNorm",
    "LucidMemory",
    "MagnitudeAwareAttention",
    "MixtureOfHeads",
    "RMSNorm",
    "RoutingAttention",
    "S2Attention",
    "SFAttention",
    "SegmentedAttention",
    "SigmoidAttention",
    "SoftmaxAttention",
    "SparseStateExpansion",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "WindowAttention",
]
