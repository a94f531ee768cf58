"""Names of the published checkpoints beside ours, for each backbone: BiFormer, MAViT, UniFormer (both families), MOAT.

A table is a list of `Entry`. A dot separates modules in PyTorch's names, a slash in MOAT's, which are those of its TensorFlow
code. Shortly (b = block, i = stage from 0, j = its block, each with .weight and .bias):

    BiFormer     downsample_layers.i.{0,1,3,4}                           downsample_i/{conv_0, norm_0, conv_1, norm_1, conv, norm}
                 stages.i.j.{pos_embed, norm1, attn.*, norm2, mlp.{0,3}, gamma1}   stage_i_j/{pos_embed, norm1, attention, ...}
    MAViT        patch_embed.proj.k, layers.i.downsample.*, proj, norm   stem_convs_*, stem_norms_*, merge_*, project, project_norm
                 layers.i.blocks.j.{pos, norm1, attn.{qkvo,lepe,proj}, norm2, ffn.*, gamma_1}   stages_i_j/{position, ...}
    UniFormer    patch_embed(i+1).*, blocks(i+1).j.*, norm, head         embed_i/*, stage_i_j/*, norm, head
                 aux_head; cls_token, cls_upsample, norm_cls, head_cls   token_head; class_token, class_embed, class_norm, class_head
    MOAT         stem/*, stagei/blockj/*, final_norm, head               stem/*, stage_i_j/*, norm, head
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attnlab.errors import ConfigError
from attnlab.models.biformer import BiFormer
from attnlab.models.mavit import MAViT
from attnlab.models.moat import MOAT
from attnlab.models.uniformer import UniFormer
from attnlab.models.uniformer_light import UniFormerLight

Path = tuple[str, ...]
_QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a checkpoint.

    Attributes:
        theirs: its name.
        ours: paths of the variables that hold it, the collection first; several are joined along its first axis.
        layout: how it is stored, see `torch_weights.LAYOUTS`.
        ones: axes of size one at its end (the window of a 1x1 convolution).
        index: place on the leading axis of our variables where the blocks of a stage are stacked, else None.
    """

    theirs: str
    ours: tuple[Path, ...]
    layout: str = "same"
    ones: int = 0
    index: int | None = None


def name_table(model: Any) -> list[Entry]:
    """Returns the names for a model; entries of what the model does not have (a bias, a layer scale) are among them.

    Raises:
        ConfigError: a model that no checkpoint was published for.
    """
    for kind, fill in _TABLES.items():
        if isinstance(model, kind):
            table = _Table()
            fill(table, model)
            return table.entries
    known = ", ".join(kind.__name__ for kind in _TABLES)
    raise ConfigError(f"model = {type(model).__name__}: has no names of a published checkpoint. Use one of {known}.")


class _Table:
    """Collects entries; `at` and `index` say where in our variables."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.index: int | None = None

    def add(self, theirs: str, *ours: Path, layout: str = "same", ones: int = 0, collection: str = "params") -> None:
        paths = tuple((collection, *path) for path in ours)
        self.entries.append(Entry(theirs, paths, layout, ones, self.index))

    def conv(self, theirs: str, at: Path) -> None:
        self.add(f"{theirs}.weight", (*at, "kernel"), layout="conv")
        self.add(f"{theirs}.bias", (*at, "bias"))

    def linear(self, theirs: str, at: Path, ones: int = 0) -> None:
        self.add(f"{theirs}.weight", (*at, "kernel"), layout="linear", ones=ones)
        self.add(f"{theirs}.bias", (*at, "bias"))

    def norm(self, theirs: str, at: Path) -> None:
        self.add(f"{theirs}.weight", (*at, "scale"))
        self.add(f"{theirs}.bias", (*at, "bias"))

    def batch_norm(self, theirs: str, at: Path) -> None:
        self.norm(theirs, at)
        self.add(f"{theirs}.running_mean", (*at, "mean"), collection="batch_stats")
        self.add(f"{theirs}.running_var", (*at, "var"), collection="batch_stats")

    def attention(self, joint: str, out: str, at: Path, parts: tuple[str, ...] = _QKV, ones: int = 0) -> None:
        self.add(f"{joint}.weight", *((*at, part, "kernel") for part in parts), layout="linear", ones=ones)
        self.add(f"{joint}.bias", *((*at, part, "bias") for part in parts), layout="vector")
        self.add(f"{out}.weight", (*at, "out", "kernel"), layout="heads_out", ones=ones)
        self.add(f"{out}.bias", (*at, "out", "bias"))


def _biformer(table: _Table, model: BiFormer) -> None:
    if model.stem != "conv" or model.variant != "legacy" or model.norm != "layernorm":
        raise ConfigError(f"stem = {model.stem!r}, variant = {model.variant!r}: only tiny, small and base have known names.")
    for place, name in ((0, "conv_0"), (3, "conv_1")):
        table.conv(f"downsample_layers.0.{place}", ("downsample_0", name))
        table.batch_norm(f"downsample_layers.0.{place + 1}", ("downsample_0", name.replace("conv", "norm")))
    for i, depth in enumerate(model.depths):
        if i:
            table.conv(f"downsample_layers.{i}.0", (f"downsample_{i}", "conv"))
            table.batch_norm(f"downsample_layers.{i}.1", (f"downsample_{i}", "norm", "batchnorm"))
        for j in range(depth):
            theirs, at = f"stages.{i}.{j}", (f"stage_{i}" if model.scan_layers else f"stage_{i}_{j}",)
            table.index = j if model.scan_layers else None
            table.conv(f"{theirs}.pos_embed", (*at, "pos_embed"))
            for number in (1, 2):
                table.norm(f"{theirs}.norm{number}", (*at, f"norm{number}", "layernorm"))
                table.add(f"{theirs}.gamma{number}", (*at, f"scale{number}", "gamma"))
            table.linear(f"{theirs}.mlp.0", (*at, "mlp", "fc1"))
            table.linear(f"{theirs}.mlp.3", (*at, "mlp", "fc2"))
            if model.topks[i] == 0:
                for number, name in ((1, "conv_in"), (2, "conv_mix"), (3, "conv_out")):
                    table.conv(f"{theirs}.attn.{number}", (*at, name))
            else:
                joint, out = ("qkv.qkv", "wo") if model.topks[i] > 0 else ("qkv", "proj")
                table.attention(f"{theirs}.attn.{joint}", f"{theirs}.attn.{out}", (*at, "attention"))
                table.conv(f"{theirs}.attn.lepe", (*at, "attention", "lepe"))
            table.index = None
    table.batch_norm("norm", ("norm",))
    table.linear("head", ("head",))


def _mavit(table: _Table, model: MAViT) -> None:
    for i in range(4):
        table.conv(f"patch_embed.proj.{3 * i}", (f"stem_convs_{i}",))
        table.batch_norm(f"patch_embed.proj.{3 * i + 1}", (f"stem_norms_{i}",))
    for i, depth in enumerate(model.depths):
        for j in range(depth):
            theirs, at = f"layers.{i}.blocks.{j}", f"stages_{i}_{j}"
            table.conv(f"{theirs}.pos", (at, "position"))
            for number, name in ((1, "attention"), (2, "ffn")):
                table.norm(f"{theirs}.norm{number}.norm", (at, f"{name}_norm"))
                table.add(f"{theirs}.gamma_{number}", (at, f"{name}_scale", "gamma"), layout="channels")
            parts = (*_QKV, "gate")
            table.attention(f"{theirs}.attn.qkvo", f"{theirs}.attn.proj", (at, "attention"), parts, ones=2)
            table.conv(f"{theirs}.attn.lepe", (at, "attention", "lepe"))
            table.linear(f"{theirs}.ffn.fc1", (at, "ffn", "fc1"), ones=2)
            table.linear(f"{theirs}.ffn.fc2", (at, "ffn", "fc2"), ones=2)
            table.conv(f"{theirs}.ffn.dwconv", (at, "ffn", "dwconv"))
        table.conv(f"layers.{i}.downsample.reduction", (f"merge_convs_{i}",))
        table.batch_norm(f"layers.{i}.downsample.norm", (f"merge_norms_{i}",))
    table.linear("proj", ("project",), ones=2)
    table.batch_norm("norm", ("project_norm",))
    table.linear("head", ("head",), ones=2)


def _uniformer(table: _Table, model: UniFormer | UniFormerLight) -> None:
    light = isinstance(model, UniFormerLight)
    for i, depth in enumerate(model.depths):
        theirs, at = f"patch_embed{i + 1}", f"embed_{i}"
        if i == 0 and (light or model.conv_stem):
            for place, name in ((0, "conv_0"), (3, "conv_1")):
                table.conv(f"{theirs}.proj.{place}", (at, name))
                table.batch_norm(f"{theirs}.proj.{place + 1}", (at, name.replace("conv", "norm")))
        elif not light and model.conv_stem:
            table.conv(f"{theirs}.proj.0", (at, "conv"))
            table.batch_norm(f"{theirs}.proj.1", (at, "norm", "batchnorm"))
        else:
            table.conv(f"{theirs}.proj", (at, "conv"))
            table.norm(f"{theirs}.norm", (at, "norm", "layernorm"))
        for j in range(depth):
            is_global = i > 1 if light else model.kinds[i] == "G"
            (_global_block if is_global else _local_block)(table, f"blocks{i + 1}.{j}", f"stage_{i}_{j}")
    table.batch_norm("norm", ("norm",))
    table.linear("head", ("head",))
    if light:
        table.add("cls_token", ("class_token",))
        table.linear("cls_upsample", ("class_embed",))
        table.norm("norm_cls", ("class_norm",))
        table.linear("head_cls", ("class_head",))
    else:
        table.linear("aux_head", ("token_head",))
        for i in range(len(model.depths)):
            table.norm(f"norm{i + 1}", (f"map_norm_{i}",))


def _local_block(table: _Table, theirs: str, at: str) -> None:
    names = {"pos_embed": "pos_embed", "conv1": "conv1", "attn": "relation", "conv2": "conv2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for name, ours in names.items():
        table.conv(f"{theirs}.{name}", (at, ours))
    for name in ("norm1", "norm2"):
        table.batch_norm(f"{theirs}.{name}", (at, name))


def _global_block(table: _Table, theirs: str, at: str) -> None:
    table.conv(f"{theirs}.pos_embed", (at, "pos_embed"))
    for name, ours in {"norm1": "norm1", "norm2": "norm2", "t_norm": "time_norm"}.items():
        table.norm(f"{theirs}.{name}", (at, ours))
    for name, ours in {"attn": "attention", "t_attn": "time_attention"}.items():
        table.attention(f"{theirs}.{name}.qkv", f"{theirs}.{name}.proj", (at, ours))
    for name in ("fc1", "fc2"):
        table.linear(f"{theirs}.mlp.{name}", (at, "mlp", name))
    for number in (1, 2, 3):
        table.add(f"{theirs}.gamma_{number}", (at, f"scale{number}", "gamma"))


def _moat(table: _Table, model: MOAT) -> None:
    def layer(theirs: str, at: Path, layout: str = "same") -> None:
        table.add(f"{theirs}/kernel", (*at, "kernel"), layout=layout)
        table.add(f"{theirs}/bias", (*at, "bias"))

    def norm(theirs: str, at: Path) -> None:
        for leaf, ours in (("gamma", "scale"), ("beta", "bias")):
            table.add(f"{theirs}/{leaf}", (*at, ours))
        for leaf, ours in (("moving_mean", "mean"), ("moving_var", "var")):
            table.add(f"{theirs}/{leaf}", (*at, ours), collection="batch_stats")

    for i in range(len(model.stem)):
        layer(f"stem/conv_{i}", ("stem", f"conv_{i}"))
        norm(f"stem/norm_{i}", ("stem", f"norm_{i}"))
    for i, depth in enumerate(model.depths):
        for j in range(depth):
            theirs, block = f"stage{i}/block{j}", (f"stage_{i}_{j}",)
            at = block if model.kinds[i] == "mbconv" else (*block, "mbconv")
            for name in ("shortcut", "expand", "shrink"):
                layer(f"{theirs}/{name}_conv", (*at, name), "pointwise")
            layer(f"{theirs}/depthwise_conv", (*at, "depthwise"), "depthwise")
            for name, ours in {"reduce": "squeeze", "expand": "excite"}.items():
                layer(f"{theirs}/se/{name}", (*at, ours), "pointwise")
            for name in ("pre_norm", "expand_norm", "depthwise_norm"):
                norm(f"{theirs}/{name}", (*at, name))
            norm(f"{theirs}/attn_norm", (*block, "attention_norm"))
            for name, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
                layer(f"{theirs}/attn/{name}", (*block, "attention", ours))
            table.add(f"{theirs}/attn/rel_pos_table", (*block, "attention", "position_table"))
    norm("final_norm", ("norm",))
    layer("head", ("head",), "pointwise")


_TABLES = {BiFormer: _biformer, MAViT: _mavit, UniFormer: _uniformer, UniFormerLight: _uniformer, MOAT: _moat}
