"""The command line, run in this process but where the process itself is the subject."""

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import mixpool
from mixpool.cli import main
from mixpool.cli.command import COMMANDS

STOCK = "torchvision/squeezenet1_0"


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "mixpool", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"mixpool {mixpool.__version__}")


def test_help_and_errors_do_not_import_the_heavy_packages():
    script = (
        "import sys, mixpool.cli as cli\n"
        "assert cli.main(['inspect', 'resnet18', '--rest', 'mean']) == 2\n"
        "print(sorted({'matplotlib', 'timm', 'torchvision', 'skimage', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done
    assert done.stderr.startswith("mixpool: error: argument --rest") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:" in out and f"mixpool {' '.join(command)}".strip() in out


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mixpool.cli.inspect.load_and_convert", interrupted)
    assert main(["inspect", STOCK]) == 130
    assert capsys.readouterr().err == "mixpool: interrupted\n"


def test_theory_says_where_it_went(fails):
    for arguments in (["theory"], ["theory", "--images", "photos", "--help"]):
        assert fails(*arguments) == "mixpool: error: theory moved: python -m benchmarks.theory, in the repository"


def test_traceback_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="--pretrained needs --model"):
        main(["demo", "--pretrained", "--traceback"])


# --- errors -----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_errors_are_one_line(checkpoint, tmp_path, fails):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["inspect", "resnet81"], "neither timm nor torchvision .*'resnet81'; did you mean"),
        (["inspect", "torchvision/resnet81"], "neither timm nor torchvision"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "none.pth"], "does not exist"),
        (["inspect", STOCK, "--checkpoint", tmp_path], "is a folder"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "text.pth"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "cut.safetensors"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "evil.pth"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "list.pth"], "expected a state dict"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "other.safetensors"], "keys missing .*1 keys unexpected"),
        (["inspect", STOCK, "--checkpoint", checkpoint, "--pretrained"], "got both"),
        (["inspect", STOCK, "--images", tmp_path / "nowhere"], "does not exist"),
        (["inspect", STOCK, "--images", tmp_path / "empty"], "found no file named"),
        (["inspect", STOCK, "--select", "some"], "--select auto, all, none or channel numbers"),
        (["inspect", STOCK, "--select", "0,96"], "channels 0 to 95, got 96"),
        (["inspect", STOCK, "--stem", "nothing"], "nothing"),
        (["inspect", STOCK, "--pooling", "max"], "argument --pooling: invalid choice: 'max'"),
        (["inspect", STOCK, "--blur", "1"], "unrecognized arguments: --blur 1"),
        (["inspect", STOCK, "--limit", "-3"], "--limit"),
        (["inspect", STOCK, "--plot", tmp_path / "x.xyz"], r"\*\.png"),
        (["inspect", "torchvision/mobilenet_v2"], "features.0.0"),
        (["demo", "--pretrained"], "--pretrained needs --model"),
        (["demo", "--output", checkpoint], "is a file"),
        ([], "COMMAND"),
        (["inspekt"], "inspekt"),
    ):
        assert re.search(message, fails(*arguments)), arguments
