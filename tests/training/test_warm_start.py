"""A run that starts from another run's parameters, with adapters."""

import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from attnlab.errors import ConfigError
from attnlab.models import safetensors, torch_weights
from attnlab.training import cli, loop, warm_start
from attnlab.training.build import build
from attnlab.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(make_tiny, tmp_path_factory):
    """(folder, parameters) of a short run with a moving average."""
    folder = str(tmp_path_factory.mktemp("base"))
    fields = {"num_train_steps": 2, "eval_every_steps": 2, "checkpoint_every_steps": 2, "optimizer.warmup_steps": 1}
    config = make_tiny(ema_decay=0.5, **fields)
    loop.train(config, folder)
    checkpoints = Checkpoints(folder, config, read_only=True)
    state, _, _ = checkpoints.restore(build(config).abstract_state)
    checkpoints.close()
    return folder, traverse_util.flatten_dict(jax.device_get(state.ema))


def test_parameters_come_from_the_other_run(make_tiny, trained, tmp_path, capsys):
    folder, base = trained
    fields = {"model.mixer": "sf", "lora.rank": 2, "init_from": folder, "ema_decay": 0.5, "batch_size": 8}
    fields["optimizer.warmup_steps"] = 0
    config = make_tiny(num_train_steps=1, eval_every_steps=1, checkpoint_every_steps=1, **fields)
    run = build(config)
    fresh = run.init_state()
    state = warm_start.load(run, fresh, folder)
    got, start = (traverse_util.flatten_dict(jax.device_get(tree)) for tree in (state.params, fresh.params))
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, base[path] if path in base else start[path])
    assert sorted({path[-1] for path in got.keys() - base.keys()}) == ["lora_a", "lora_b"]
    loop.train(config, str(tmp_path / "run"))
    assert f"parameters of {folder}" in capsys.readouterr().out
    checkpoints = Checkpoints(str(tmp_path / "run"), config, read_only=True)
    after = traverse_util.flatten_dict(jax.device_get(checkpoints.restore(run.abstract_state)[0].params))
    checkpoints.close()
    for path in base:
        assert np.array_equal(after[path], base[path]) == ("norm" not in "/".join(path) and "embed" not in path), path


def test_what_does_not_fit_is_refused(make_tiny, trained, tmp_path):
    folder, _ = trained
    config = make_tiny(**{"model.num_layers": 3})
    run = build(config)
    with pytest.raises(ConfigError, match=r"another model(.|\n)*layers/blocks_0"):
        warm_start.load(run, run.init_state(), folder)
    with pytest.raises(ConfigError, match="is neither a folder nor a file"):
        warm_start.load(run, None, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="holds no run"):
        warm_start.load(run, None, str(tmp_path))


def test_parameters_come_from_a_file_of_weights(tmp_path):
    """A backbone's published names: what was written comes back, with the batch statistics, into the moving average too."""
    config = cli.load_config(f"{ROOT / 'configs' / 'uniformer.py'}:smoke")
    config.ema_decay = 0.5
    run = build(config)
    fresh = run.init_state()
    other = jax.tree.map(lambda x: 2.0 * np.asarray(x) + 1.0, {"params": fresh.params, **fresh.collections})
    path = str(tmp_path / "weights.safetensors")
    safetensors.write_safetensors(path, torch_weights.to_state_dict(run.task.model, other))
    state = warm_start.load(run, fresh, path)
    jax.tree.map(np.testing.assert_array_equal, {"params": state.params, **state.collections}, other)
    jax.tree.map(np.testing.assert_array_equal, state.ema, other["params"])
    arrays = dict(safetensors.read_arrays(path))
    name = next(iter(arrays))
    arrays[name] = arrays[name][..., :1]
    safetensors.write_safetensors(path, arrays)
    with pytest.raises(ConfigError, match=r"config.init_from = .*do not fit"):
        warm_start.load(run, fresh, path)
