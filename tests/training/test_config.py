"""Config checks: every bad value is refused with its field, its value and a fix; JSON and presets."""

import math

import jax
import ml_collections
import pytest

from attnlab import registry
from attnlab.errors import ConfigError, nearest
from attnlab.training import build, cli
from attnlab.training import config as config_lib
from attnlab.training.mesh import make_mesh, mesh_shape

BAD = [
    ({"batch_size": 0}, "config.batch_size = 0"),
    ({"num_train_steps": -3}, "config.num_train_steps = -3"),
    ({"model.num_heads": 5}, "config.model.num_heads = 5: does not divide config.model.dim = 32"),
    ({"model.num_kv_heads": 3}, "config.model.num_kv_heads = 3"),
    ({"model.mixer": "sigmod"}, "did you mean 'sigmoid'"),
    ({"model.pattern": ("softmax", "nothing")}, "config.model.pattern = 'nothing'"),
    ({"model.remat": "ful"}, "did you mean 'full'"),
    ({"model.norm": "rms"}, "did you mean 'rmsnorm'"),
    ({"model.dropout": 1.5}, "config.model.dropout = 1.5"),
    ({"grad_accum": 3}, "config.grad_accum = 3: does not divide config.batch_size = 4"),
    ({"loss_chunk": 5}, "config.loss_chunk = 5: does not divide config.seq_len = 32"),
    ({"mesh.fsdp": 3}, "needs a multiple of 3 devices, and there are 1"),
    ({"mesh.data": 2}, "needs 2 devices, and there are 1"),
    ({"mesh.fsdp": -1}, "more than one -1"),
    ({"optimizer.schedule": "cosin"}, "did you mean 'cosine'"),
    ({"optimizer.warmup_steps": 12}, "not shorter than config.num_train_steps = 12"),
    ({"data.packing": "pack"}, "did you mean 'packed'"),
    ({"task": "language"}, "did you mean 'language_modeling'"),
    ({"model.vocab_size": 100}, "smaller than the vocabulary of the data, 257"),
    ({"profile_steps": (3, 1)}, "is not (first, last)"),
    ({"sharding_rules": (("embd", "fsdp"),)}, "did you mean 'embed'"),
    ({"sharding_rules": (("embed", "fdsp"),)}, "'fdsp' is not a mesh axis"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_field_is_refused_before_compute(tiny, changes, message):
    with pytest.raises(ConfigError) as error:
        build.build(tiny(**changes))
    assert message.lower() in str(error.value).lower()


def test_batch_and_heads_against_the_mesh(run_python, tiny_flags, tmp_path):
    """On eight devices: rows, then heads, that do not divide."""
    for fields, message in (
        ({"mesh.data": 8}, "config.batch_size = 4: is not divisible over the mesh"),
        ({"mesh.tensor": 8, "mesh.data": 1}, "does not divide the dimension of 2 of"),
        ({"batch_size": 8, "grad_accum": 2}, "does not divide the 1 rows that a device has"),
        ({"batch_size": 8, "seq_len": 36, "mesh.data": 1, "mesh.context": 8}, "config.seq_len = 36"),
    ):
        process = run_python(tiny_flags(tmp_path / "run", **fields), devices=8, check=False)
        assert process.returncode == 2, process.stderr
        assert message in process.stderr
        assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()


COMMANDS = [
    (["--config.model.num_layer=3"], "did you mean --config.model.num_layers?"),
    (["--config.num_layers=3"], "did you mean --config.model.num_layers?"),
    (["--config.batch_size=many"], "invalid literal for int()"),
    (["--config.model=3"], "is a group of fields"),
    (["--wrkdir=x"], "workdir"),
    (["stray"], "unexpected argument 'stray'"),
    (["--config.data.name=text:no/such/folder"], "no/such/folder"),
    (["--config.data.name=stdlb"], "stdlib"),
    (["--aot=tpu:v9:2x2"], "v9"),
    (["--aot=tpu:v5e"], "tpu:v5e:16x16"),
    (["--process_id=1"], "--coordinator"),
    (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=[case[0][0] for case in COMMANDS])
def test_bad_command_ends_with_one_message(run_python, tmp_path, arguments, message):
    command = ["train.py", "--config=configs/lm.py:smoke", f"--workdir={tmp_path / 'run'}", *arguments]
    process = run_python(command, check=False)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_config_file_and_preset_hints():
    with pytest.raises(ConfigError, match=r"configs/lm\.py"):
        cli.load_config("configs/lmm.py:smoke")
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        cli.load_config("configs/lm.py:smok")
    with pytest.raises(ConfigError, match="get_config"):
        cli.load_config("train.py")


def test_json_round_trip_keeps_every_field(tiny):
    config = tiny(**{"model.pattern": ("sigmoid", "softmax")})
    again = config_lib.from_json(config_lib.to_json(config))
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(config))
    assert config_lib.differences(config, again) == []


def test_fields_that_are_younger_than_a_run_get_their_defaults(tiny):
    saved = tiny().copy_and_resolve_references()
    saved.unlock()
    del saved.ema_decay, saved.optimizer.eps, saved.optimizer.groups.vectors, saved.model.dropout, saved.sharding_rules
    saved.batch_size = 7
    have = config_lib.complete(saved)
    assert (have.ema_decay, have.optimizer.eps, have.batch_size) == (0.0, 1e-8, 7)
    assert have.sharding_rules == config_lib.SHARDING_RULES
    assert "vectors" not in have.optimizer.groups and "dropout" not in have.model
    assert "ema_decay" not in saved


def test_only_fields_that_change_a_step_count_as_differences(tiny):
    old, new = tiny(), tiny(num_train_steps=99, log_every_steps=7, **{"mesh.fsdp": 1, "model.remat": "full"})
    assert config_lib.differences(old, new) == []
    assert config_lib.differences(old, tiny(seed=1, **{"model.dim": 64})) == [("model.dim", 32, 64), ("seed", 0, 1)]


def test_options_of_mixers_that_the_run_does_not_use_do_not_count(tiny):
    old = tiny().unlock()
    old.model.mixer_options.sigmoid.qk_norm = "rmsnorm"
    del old.model.mixer_options.sigmoid["rope"]  # as if the run were older than the field
    assert config_lib.differences(old, tiny()) == []
    old.model.mixer = "sigmoid"
    assert config_lib.differences(old, tiny(**{"model.mixer": "sigmoid"})) == [
        ("model.mixer_options.sigmoid.qk_norm", "rmsnorm", None)
    ]


def test_every_option_of_a_mixer_is_a_field(tiny):
    config = tiny()
    with config.unlocked():
        config.model.mixer_options.local = ml_collections.ConfigDict({"mixer": "softmax", "window": 4})
    config.model.pattern = ("local", "sigmoid")
    config.model.mixer_options.sigmoid.bias = -2.5
    run = build.build(config)
    mixers = [run.task.model.make_mixer(entry) for entry in ("local", "sigmoid")]
    assert mixers[0].window == 4
    assert mixers[1].bias == -2.5
    config.model.mixer_options.sigmoid.bias = None
    sigmoid = build.build(config).task.model.make_mixer("sigmoid")
    assert sigmoid.constant_bias() == -math.log(32)  # the length trained with


def test_mesh_shape_fills_what_is_left():
    assert mesh_shape({"data": -1, "fsdp": 2, "tensor": 2, "context": 1}, 16)["data"] == 4
    with pytest.raises(ConfigError, match=r"config\.mesh\.tensor = 0"):
        mesh_shape({"data": -1, "fsdp": 2, "tensor": 0, "context": 1}, 16)
    assert make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1]).size == 1


def test_registry_is_open_and_guards_its_names():
    class Mine:
        pass

    registry.register("mixer", "mine_for_the_test", Mine)
    assert registry.get("mixer", "mine_for_the_test") is Mine
    with pytest.raises(ConfigError, match="already registered"):
        registry.register("mixer", "mine_for_the_test", object)
    with pytest.raises(ConfigError, match="already registered"):
        registry.register("mixer", "softmax", Mine)
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        registry.get("mixer", "sofmax")
    registry._registered["mixer"].pop("mine_for_the_test")
    for kind, table in registry._TABLE.items():
        for name in table:
            assert registry.get(kind, name) is not None
    assert nearest("zzz", ["alpha", "beta"]) == "known: alpha, beta"
