"""What `import mixpool` costs, and that its modules import downwards only; each with a proof that the test can fail."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import mixpool

PACKAGE = Path(mixpool.__file__).parent

# --- libraries --------------------------------------------------------------------------------------------------------

HEAVY = (
    "triton",
    "matplotlib",
    "timm",
    "torchvision",
    "skimage",
    "scipy",
    "pytorch_wavelets",
    "pywt",
    "PIL",
    "rich",
    "safetensors",
    "onnx",
    "onnxruntime",
)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def heavy_modules_after(statement: str) -> set[str]:
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    return {name.split(".")[0] for name in run_python(code).split()} & set(HEAVY)


def test_import_loads_no_heavy_library():
    assert heavy_modules_after("import mixpool") == set()


def test_the_test_of_heavy_libraries_can_fail():
    assert heavy_modules_after("import mixpool, safetensors, matplotlib") >= {"safetensors", "matplotlib"}


def test_every_public_name_is_there():
    names = run_python("import mixpool; print(*[name for name in mixpool.__all__ if hasattr(mixpool, name)])").split()
    assert names == sorted(mixpool.__all__) and len(names) > 10


# --- time -------------------------------------------------------------------------------------------------------------


def import_time_ratio(statement: str, runs: int = 3) -> float:
    """(torch + statement) over torch, both in the same fresh interpreter; the median of several.

    In one interpreter and not in two, so that a busy machine slows both alike.
    """
    code = (
        "from time import perf_counter as now; a = now(); import torch; b = now(); "
        f"{statement}; c = now(); print((c - a) / (b - a))"
    )
    return statistics.median(float(run_python(code)) for _ in range(runs))


def test_import_takes_little_more_than_torch():
    assert import_time_ratio("import mixpool") < 1.3


def test_the_test_of_the_import_time_can_fail():
    assert import_time_ratio("import time; time.sleep(0.5 * (b - a))", runs=1) > 1.3


# --- layers of the package --------------------------------------------------------------------------------------------

LEVELS = [
    {"modes"},
    {"modulus", "moments"},
    {"filters", "reference", "gabor", "stability", "probe", "data", "records", "theory", "dtcwpt", "dead_leaves"}
    | {"theory_table", "alexnet", "metrics"},
    {"fused"},
    {"trial"},
    {"backend"},
    {"comparison", "normalization", "functional", "wavelet_bank", "labelled_images"},
    {"prediction", "gap_parts"},
    {"stats", "experiment"},
    {"plan", "calibration", "parts"},
    {"selection", "find", "report"},
    {"layers", "plots"},
    {"checkpoint", "theory_plots"},
    {"convert"},
    {"wavelet_stem", "evaluation"},
    {"__init__"},
    {"timm_models"},
    {"loading", "timm_run", "evaluate"},
    {"demo", "training", "evaluate_command"},
    {"train", "arguments"},
    {"cli"},
    {"__main__"},
]
EXCEPTIONS = {("records", "__init__")}  # for mixpool.__version__, inside a function


def imported_modules(source: str) -> set[str]:
    """Modules of mixpool that a source imports, also inside functions, but not for type checking alone."""
    found, todo = set(), [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            is_root = node.module == "mixpool"
            found |= {f"mixpool.{name.name}" for name in node.names} if is_root else {node.module}
        todo.extend(ast.iter_child_nodes(node))
    parts = [name.split(".") for name in found if name.split(".")[0] == "mixpool"]
    names = {path[1] if len(path) > 1 else "__init__" for path in parts}
    return {name if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() else "__init__" for name in names}


def upward_imports(sources: dict[str, str]) -> list[str]:
    """Sentences about every import that does not go to a lower level."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    sentences = [f"{name}: not in LEVELS of test_imports.py, add it" for name in sources if name not in level]
    for name, source in sources.items():
        for other in imported_modules(source):
            if (name, other) not in EXCEPTIONS and level.get(other, 99) >= level.get(name, 99):
                sentences.append(f"{name} (level {level.get(name)}) imports {other} (level {level.get(other)})")
    return sentences


def test_modules_import_lower_levels_only():
    sources = {path.stem: path.read_text() for path in PACKAGE.glob("*.py")}
    assert len(sources) > 15
    assert upward_imports(sources) == []


def test_the_fused_path_imports_lower_levels_only():
    sources = [path.read_text() for path in (PACKAGE / "fused").glob("*.py")]
    assert len(sources) > 5
    below = {name for names in LEVELS[: LEVELS.index({"fused"})] for name in names}
    assert [imported_modules(source) - {"fused"} - below for source in sources] == [set()] * len(sources)


@pytest.mark.parametrize("folder", ["evaluation", "training"])
def test_the_modules_of_a_folder_import_lower_levels_only(folder):
    sources = [path.read_text() for path in (PACKAGE / folder).glob("*.py")]
    assert len(sources) > 5
    level = next(i for i, names in enumerate(LEVELS) if folder in names)
    below = {name for names in LEVELS[:level] for name in names} | {"__init__"}  # records name the version
    assert [imported_modules(source) - {folder} - below for source in sources] == [set()] * len(sources)


def test_the_test_of_the_levels_can_fail():
    assert upward_imports({"filters": "from mixpool.stem.module import MixPoolStem"})
    assert upward_imports({"layers": "def f():\n    from mixpool import convert\n"})
    assert upward_imports({"plan": "import mixpool.selection.calibrate"}), "the same level is not lower"
    assert upward_imports({"plan": "from mixpool import MixPoolStem"})
    assert upward_imports({"news": ""})
    assert not upward_imports({"plan": "import torch\nfrom mixpool.filters import FilterStats"})
    only_types = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mixpool.stem.module import MixPoolStem\n"
    )
    assert not upward_imports({"plan": only_types})
