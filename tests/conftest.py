"""Shared by all tests: the CPU backend, small folders of text, and Python in a process of its own."""

import os
import pathlib
import subprocess
import sys

# Before jax is imported by any test: no accelerator, and quiet C++ logs of compilers that look for one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """These rooms' tests compile much and compute little: without XLA's dear passes they take two thirds of the time.

    The passes are on in tests/golden, tests/training, and in the processes that tests start, but for those started `quickly`.
    """
    import jax

    if request.path.parent.name not in {"nn", "ops", "models", "methods", "inference"}:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs would fill the memory by the end of the run."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> pathlib.Path:
    """One folder for prepared data sets and compiled programs, shared by the processes that tests start."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_python(cache_dir):
    """Runs a script (`["train.py", "--config=..."]`) or code (`["-c", code]`) in its own process, at the project's root.

    Returns the finished process with its output as text. `devices` forces that many host devices; `quickly` leaves out XLA's dear
    passes, for a process that compiles much and computes little.
    """

    def run(arguments, *, devices=1, env=None, timeout=300, check=True, quickly=False):
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quickly else {}
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(cache_dir, devices) | quick | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and process.returncode:
            raise AssertionError(f"exit {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
        return process

    return run


@pytest.fixture(scope="session")
def start_python(cache_dir):
    """Like `run_python`, but returns the running process (stdout and stderr in one pipe)."""

    def start(arguments, *, devices=1, env=None):
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(cache_dir, devices) | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def environment(cache_dir, devices=1):
    return {
        **os.environ,
        "PYTHONPATH": os.fspath(ROOT),
        "XDG_CACHE_HOME": os.fspath(cache_dir),
        "JAX_COMPILATION_CACHE_DIR": os.fspath(cache_dir / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
