"""Fixtures of all tests: fixed seed, few threads, NaN in fresh memory, and the way to the optional shared folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MIXPOOL_SHARED", REPOSITORY.parent / "shared"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors

# Dynamo lists torch's functions when it is first asked, and has to find them as they are, not poisoned as below.
torch.compile(lambda x: x + torch.empty_like(x).fill_(1), backend="eager", fullgraph=True)(torch.ones(1))

torch.set_num_threads(1)  # the tensors here are small; two threads are slower, more so on a busy machine
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="every test that is not slow, once: with the first of its parameters"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        kept = firsts([item for item in items if item.get_closest_marker("slow") is None])
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def firsts(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first item of every test function."""
    return list({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())[::-1]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before; another seed tells noise from a bug."""
    torch.manual_seed(int(os.environ.get("MIXPOOL_TEST_SEED", "0")))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what mixpool allocates with NaN (integers with 99), so that an output that is not written cannot pass."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if torch.compiler.is_compiling():
                return out
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "mixpool" and isinstance(out, Tensor) and out.dtype != torch.bool:
                with torch.no_grad():
                    out.fill_(float("nan") if out.is_floating_point() or out.is_complex() else 99)
            return out

        return wrapper

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder with data beside the repository; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared folder, not found at {SHARED} (set MIXPOOL_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """shared/data; the test is skipped without it."""
    if not (shared / "data").is_dir():
        pytest.skip(f"needs {shared / 'data'}")
    return shared / "data"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The folder of a small data set, see `training_runs.write_photos`."""
    from training_runs import write_photos

    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def tiny_models():
    """The networks of tests/tiny_models.py in timm's registry."""
    import tiny_models

    return tiny_models
