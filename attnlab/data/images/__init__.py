"""Images: sources, transforms and resumable loaders. `open_images(config)` is the way in.

    data = open_images(config)
    loader = data.loader("train", batch_size=64, seed=0, shuffle=True, repeat=True)
    batch = next(loader)                 # images, labels, other_labels, mix, mask, record

`config.data` has the fields that `attnlab.methods.image_classification` lists.
"""

from attnlab.data.images.dataset import ImageData, open_images

__all__ = ["ImageData", "open_images"]
