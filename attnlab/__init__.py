"""attnlab: the JAX laboratory of attention.

`attnlab.ops` are pure functions of arrays, `attnlab.nn` flax modules that map tokens to tokens, `attnlab.models` whole
networks. Sub-packages are imported on first use, so that `import attnlab` costs nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
_ROOMS = ("ops", "nn", "models", "methods", "inference", "analysis", "data", "training", "registry")
__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"attnlab.{name}")
    raise AttributeError(f"module 'attnlab' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_ROOMS])
