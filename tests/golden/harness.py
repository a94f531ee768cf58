"""Reads a golden case, runs it through its adapter and compares every stored output and gradient."""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

ADAPTERS = pathlib.Path(__file__).parent / "adapters"
GROUPS = ("in", "param", "out", "cot", "grad")
REQUIRED = ("system", "case", "config", "rtol", "atol")
OPTIONAL = ("computes", "reference", "layout", "notes", "strings")


class CaseError(Exception):
    """A case that cannot be run or does not agree; the message lists all of its faults."""


class Read(Mapping):
    """A mapping that knows what was read from it, so that nothing stored is passed over in silence."""

    def __init__(self, values):
        self._values = dict(values)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return self._values[key]

    def __contains__(self, key):  # a question is not a use
        return key in self._values

    def get(self, key, default=None):
        self.seen.add(key)
        return self._values.get(key, default)

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def unread(self):
        return sorted(set(self._values) - self.seen)


@dataclasses.dataclass
class Case:
    """What an adapter sees: the configuration, and strings where the case has some."""

    name: str
    config: Read
    strings: Read


def find(root):
    """Returns ({slug: [case stem paths]} with an adapter, [slugs without one]) below a folder of goldens.

    The folder holds one folder per system, or is itself that of one system.
    """
    root = pathlib.Path(root)
    found, foreign = {}, []
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    for folder in folders:
        stems = sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in (".npz", ".json")})
        if not stems:
            continue
        slug = folder.resolve().name
        if not (ADAPTERS / f"{slug}.py").exists():
            slug = _system(stems) or slug
        if (ADAPTERS / f"{slug}.py").exists():
            found.setdefault(slug, []).extend(stems)
        else:
            foreign.append(slug)
    return found, foreign


def run(slug, stem):
    """Runs one case.

    Raises:
        CaseError: the case is broken, is not wholly understood by its adapter, or does not agree.
    """
    description, arrays = _load(stem)
    adapter = _adapter(slug)
    case = Case(f"{slug}/{stem.name}", Read(description["config"]), Read(description.get("strings", {})))
    groups = {group: {} for group in GROUPS}
    for key, value in arrays.items():
        group, _, name = key.partition("/")
        if group not in groups or not name:
            raise CaseError(f"{case.name}: key {key!r} belongs to none of {', '.join(GROUPS)}")
        groups[group][name] = value
    sources = {f"{group}/{name}": value for group in ("in", "param") for name, value in groups[group].items()}
    missing = sorted(set(groups["grad"]) - set(sources))
    if missing:
        raise CaseError(f"{case.name}: gradients of {missing}, which are not stored")
    inputs, params = Read({}), Read({})

    def outputs(differentiated):
        nonlocal inputs, params
        merged = sources | differentiated
        inputs = Read({key[3:]: value for key, value in merged.items() if key.startswith("in/")})
        params = Read({key[6:]: value for key, value in merged.items() if key.startswith("param/")})
        return {name: jnp.asarray(value) for name, value in adapter.outputs(case, inputs, params).items()}

    def everything(differentiated):
        results, pullback = jax.vjp(outputs, differentiated)
        return results, _gradients(case, adapter, results, pullback, groups)

    everything = everything if getattr(adapter, "EAGER", False) else jax.jit(everything)
    with jax.default_matmul_precision("highest"):
        results, gradients = everything({key: jnp.asarray(sources[key]) for key in groups["grad"]})
    faults = [f"not read by the adapter: in/{name}" for name in inputs.unread()]
    faults += [f"not read by the adapter: param/{name}" for name in params.unread()]
    faults += [f"not read by the adapter: config {name!r}" for name in case.config.unread()]
    faults += [f"not read by the adapter: string {name!r}" for name in case.strings.unread()]
    tolerance = {"rtol": float(description["rtol"]), "atol": float(description["atol"])}
    for prefix, have, want in (("out", results, groups["out"]), ("grad", gradients, groups["grad"])):
        for name, expected in want.items():
            fault = _difference(have.get(name), expected, **tolerance)
            if fault:
                faults.append(f"{prefix}/{name}: {fault}")
    if faults:
        raise CaseError(f"{case.name}:\n  " + "\n  ".join(faults))


def _gradients(case, adapter, results, pullback, groups):
    if not groups["grad"]:
        if groups["cot"]:
            raise CaseError(f"{case.name}: cotangents but no gradients to compare")
        return {}
    cotangents = {name: _zero(value) for name, value in results.items()}
    if groups["cot"]:
        for name, value in groups["cot"].items():
            if name not in results:
                raise CaseError(f"{case.name}: cot/{name} belongs to an output that the adapter does not return")
            if value.shape != results[name].shape:
                raise CaseError(f"{case.name}: cot/{name} has shape {value.shape}, the output {results[name].shape}")
            cotangents[name] = jnp.asarray(value, results[name].dtype)
    elif hasattr(adapter, "objective"):
        floats = {name: value for name, value in results.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        cotangents |= jax.grad(lambda chosen: adapter.objective(case, results | chosen))(floats)
    else:
        raise CaseError(f"{case.name}: gradients without a cotangent, and the adapter has no objective")
    return pullback(cotangents)[0]


def _zero(value):
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)


def _difference(actual, expected, *, rtol, atol):
    """Returns in words how two arrays differ, or None."""
    if actual is None:
        return "not returned by the adapter"
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        return f"shape {actual.shape}, expected {expected.shape}"
    if not np.issubdtype(expected.dtype, np.floating):
        wrong = int(np.sum(actual != expected))
        return f"{wrong} of {expected.size} differ" if wrong else None
    close = np.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return None
    error = np.abs(actual.astype(np.float64) - expected)
    at = np.unravel_index(int(np.argmax(np.where(close, -1.0, np.nan_to_num(error, nan=np.inf)))), error.shape)
    return (
        f"{int((~close).sum())} of {expected.size} differ, worst at {tuple(map(int, at))}: {actual[at]:.8g}, "
        f"expected {expected[at]:.8g} (rtol {rtol:g}, atol {atol:g})"
    )


def _load(stem):
    try:
        description = json.loads(stem.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise CaseError(f"{stem.with_suffix('.json')} cannot be read: {error}") from None
    if not isinstance(description, dict):
        raise CaseError(f"{stem.with_suffix('.json')}: not an object")
    missing = [key for key in REQUIRED if key not in description]
    unknown = sorted(set(description) - {*REQUIRED, *OPTIONAL})
    if missing or unknown:
        raise CaseError(f"{stem.with_suffix('.json')}: fields missing {missing}, fields unknown {unknown}")
    try:
        with np.load(stem.with_suffix(".npz"), allow_pickle=False) as stored:
            return description, {key: stored[key] for key in stored}
    except Exception as error:  # zipfile, zlib, numpy: whatever a damaged file brings up
        raise CaseError(f"{stem.with_suffix('.npz')} cannot be read: {error}") from None


def _system(stems):
    """Returns the system that the first readable description names."""
    for stem in stems:
        try:
            return str(json.loads(stem.with_suffix(".json").read_text())["system"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _adapter(slug):
    spec = importlib.util.spec_from_file_location(f"golden_adapter_{slug}", ADAPTERS / f"{slug}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
