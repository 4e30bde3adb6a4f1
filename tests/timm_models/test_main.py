"""The launcher of timm's scripts, on scripts written here, since timm's are not in its wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import mixpool
from mixpool.timm_models import __main__ as timm_run

SCRIPT = """
import sys
from neighbour import build

if __name__ == "__main__":
    print(sys.argv)
    print(build(sys.argv[2]))
"""
NEIGHBOUR = """
import timm

def build(name):
    model = timm.create_model(name, num_classes=3)
    return type(model).__name__, model.num_classes
"""


@pytest.fixture(autouse=True)
def restored_interpreter(monkeypatch):
    """The launcher changes these for its whole process, which here is pytest's."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def script(tmp_path) -> Path:
    """A script that imports another beside it and builds the model that is its second argument."""
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    path = tmp_path / "validate.py"
    path.write_text(SCRIPT)
    return path


def launch(*arguments: str | Path, module: str = "mixpool.timm_models") -> subprocess.CompletedProcess:
    launcher = ["-m", module] if module else []
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_script_knows_the_models_and_gets_its_arguments(script):
    done = launch(script, "--model", "mixpool_resnet18", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str([str(script), "--model", "mixpool_resnet18", "--help"]),
        "('MixPoolResNet', 3)",
    ]


@pytest.mark.slow
def test_without_the_launcher_the_model_is_unknown(script):
    done = launch(script, "--model", "mixpool_resnet18", module="")
    assert done.returncode == 1 and "Unknown model" in done.stderr


def test_a_checkpoint_of_a_converted_model_loads(tmp_path, capsys):
    """What timm's validate.py does with --checkpoint."""
    model = timm.create_model("resnet18", num_classes=3)
    mixpool.initialize(model, "gabor")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model_best.pth.tar")
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys, torch\n"
        "from timm.models import create_model, load_checkpoint\n"
        "model = create_model('mixpool_resnet18', num_classes=3, in_chans=3, global_pool=None, scriptable=False)\n"
        "load_checkpoint(model, sys.argv[1], use_ema=False)\n"
        "print(model.eval()(torch.linspace(-1, 1, 12288).view(1, 3, 64, 64).sin()).sum().item())\n"
    )
    assert timm_run.main([str(script), str(tmp_path / "model_best.pth.tar")]) == 0
    with torch.no_grad():
        expected = model.eval()(torch.linspace(-1, 1, 12288).view(1, 3, 64, 64).sin()).sum().item()
    assert float(capsys.readouterr().out) == pytest.approx(expected, rel=1e-5)


def test_errors_and_exit_codes_of_the_script_pass_through(tmp_path):
    path = tmp_path / "benchmark.py"
    path.write_text("import sys; sys.exit(7)")
    with pytest.raises(SystemExit) as left:
        timm_run.main([str(path)])
    assert left.value.code == 7
    path.write_text("raise LookupError('no such bench')")
    with pytest.raises(LookupError, match="no such bench"):
        timm_run.main([str(path)])


def test_help(capsys):
    assert timm_run.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert "usage: python -m mixpool.timm_models SCRIPT" in out and err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m mixpool.timm_models SCRIPT"),
        (["missing.py", "--help"], "expected a script, but missing.py does not exist; timm's are in its repository"),
        (["."], "expected a script, but . is a folder"),
        (["--model", "mixpool_resnet18"], "expected a script before the option --model"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert timm_run.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert len(err.splitlines()) == 1 or not arguments
