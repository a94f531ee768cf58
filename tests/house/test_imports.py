"""The rooms: imports point only downwards, `import attnlab` is cheap, and no file grows past its size."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORDER = [
    {"errors", "types"},
    {"registry"},
    {"ops", "data"},
    {"nn"},
    {"models"},
    {"methods", "inference", "analysis"},
    {"training"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted((ROOT / "attnlab").rglob("*.py")) + sorted((ROOT / "kernels_pallas").rglob("*.py"))


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "attnlab" and len(parts) > 1 and parts[1] in LEVEL:
                yield parts[1], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    relative = path.relative_to(ROOT).parts
    room = relative[1].removesuffix(".py")
    level = LEVEL["ops"] if relative[0] == "kernels_pallas" else LEVEL.get(room, len(ORDER))
    for other, line in imported_rooms(path):
        same = room == other and relative[0] == "attnlab"
        allowed = LEVEL[other] < level or same or (relative[0] == "kernels_pallas" and other == "ops")
        assert allowed, f"{path.relative_to(ROOT)}:{line} imports attnlab.{other}, which is above or beside it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 700 if path.relative_to(ROOT).parts[0] == "kernels_pallas" else 400
    assert len(path.read_text().splitlines()) <= limit


def test_import_attnlab_imports_nothing_heavy(run_python):
    code = "import sys, attnlab; print([name for name in ('jax', 'flax', 'numpy', 'grain') if name in sys.modules])"
    assert run_python(["-c", code]).stdout.strip() == "[]"


def test_nothing_imports_tensorflow(run_python):
    code = "import sys, attnlab.training.loop, attnlab.training.evaluate; print('tensorflow' in sys.modules)"
    assert run_python(["-c", code]).stdout.strip().endswith("False")
