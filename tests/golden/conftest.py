"""`python -m pytest tests/golden --goldens DIR`: every case below DIR becomes a test; see README.md."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import harness

sys.path.pop(0)

DATA = pathlib.Path(__file__).parent / "data"
_FOREIGN = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(DATA), metavar="DIR", help="folder of golden cases, default tests/golden/data")


def pytest_generate_tests(metafunc):
    if "golden_case" not in metafunc.fixturenames:
        return
    root = metafunc.config.getoption("--goldens", str(DATA))
    found, foreign = harness.find(root)
    metafunc.config.stash[_FOREIGN] = foreign
    cases = [(slug, stem) for slug, stems in found.items() for stem in stems]
    # An empty folder must not pass: the one case that stands for it fails.
    cases = cases or [(None, pathlib.Path(root))]
    metafunc.parametrize("golden_case", cases, ids=[f"{slug}-{stem.name}" for slug, stem in cases])


def pytest_terminal_summary(terminalreporter, config):
    foreign = config.stash.get(_FOREIGN, [])
    if foreign:
        terminalreporter.section("golden systems without an adapter")
        for slug in foreign:
            terminalreporter.line(f"{slug}: not run, there is no tests/golden/adapters/{slug}.py")
