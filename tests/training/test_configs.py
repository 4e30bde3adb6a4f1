"""The configurations: read strictly, explained, and tried by `mixpool train --dry-run` and by timm's own steps."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from training_runs import parse

import mixpool
from mixpool.cli import command as cli
from mixpool.cli.common import EXIT_USER_ERROR
from mixpool.conversion.stock import converted_stems
from mixpool.training.configuration import read_config
from mixpool.training.model import build_model
from mixpool.training.options import GROUPS, OPTIONS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
CIFAR = [path for path in CONFIGS if path.stem.startswith("cifar10")]
COMMAND = re.compile(r"(?:^|-m )mixpool train (-c [^()\n]*(?:\n +--[^()\n]*)*)", flags=re.MULTILINE)

# timm leaves the image files that it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


# --- what the files say -----------------------------------------------------------------------------------------------


def header(config: Path) -> str:
    """The comment on top, without its signs."""
    lines = config.read_text().split("\n")
    count = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])


def entry(config: Path, name: str) -> str | None:
    """The entry `name:` of the header, with the indented lines that continue it."""
    found = re.search(rf"^{name}: +(.*(?:\n {{5,}}.*)*)", header(config), flags=re.MULTILINE)
    return None if found is None else found[1]


def variant(config: Path) -> list[str]:
    """The options of the entry `stock`, which trains the network without the modulus for comparison."""
    return shlex.split(entry(config, "stock") or "")


def unknown_to_timm(keys) -> set[str]:
    """Keys that timm's script does not have, and so would pass over in silence."""
    return {key for key in keys if key not in OPTIONS or key in GROUPS["mixpool"]}


def test_the_configurations_of_the_readme_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "cifar10_resnet18",
        "cifar10_resnet18_30epochs",
        "imagenet_alexnet_scratch",
        "imagenet_resnet18_16epochs",
        "imagenet_resnet34_finetune",
        "imagenet_resnet34_scratch",
        "imagenet_resnet50_finetune",
    }


@EVERY_CONFIG
def test_every_key_is_known_here_and_to_timm(config):
    settings = read_config(config)
    assert settings["device_modules"] == ["mixpool.timm_models"] and settings["model"].startswith("mixpool_")
    assert unknown_to_timm(settings) == set()


def test_the_test_of_the_keys_can_fail():
    assert unknown_to_timm({"distill": "stock", "lr": 0.1, "learning_rate": 0.1}) == {"distill", "learning_rate"}


@EVERY_CONFIG
def test_the_header_says_command_hardware_time_and_what_to_expect(config):
    assert f"-c configs/{config.name} " in entry(config, "command")
    assert "GPU" in entry(config, "hardware")
    assert re.match(r"(estimated|measured) [\d.]+ (minutes|hours?)", entry(config, "time"))
    assert re.match(r"not run yet|see .*benchmarks/(\w+/)?README\.md", entry(config, "expected"))


@EVERY_CONFIG
def test_the_commands_of_the_header_are_understood(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = COMMAND.findall(entry(config, "command"))
    assert commands
    for command in commands:
        assert parse(shlex.split(command)).config == f"configs/{config.name}"


@pytest.mark.parametrize("config", [path for path in CONFIGS if variant(path)], ids=lambda path: path.stem)
def test_the_stock_variant_has_no_modulus(config):
    options = parse(["-c", str(config), *variant(config), "--no-pretrained"])
    assert options.experiment == f"{config.stem}_stock"
    assert all(stem.num_complex == 0 for stem in converted_stems(build_model(options)).values())


@EVERY_CONFIG
def test_the_models_that_the_header_proposes_can_be_built(config):
    for arguments in re.findall(r"--model-kwargs((?:\s+\w+=\w+)+)", header(config)):
        build_model(parse(["-c", str(config), "--no-pretrained", "--model-kwargs", *arguments.split()]))


# --- trial runs -------------------------------------------------------------------------------------------------------


def write_images(folder: Path, num_classes: int, side: int) -> None:
    """One image of noise per class, in a folder of its own."""
    pixels = torch.randint(256, (num_classes, side, side, 3), dtype=torch.uint8).numpy()
    for label in range(num_classes):
        path = folder / f"class{label:04}"
        path.mkdir(parents=True)
        Image.fromarray(pixels[label]).save(path / "0.png")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """A folder as ImageNet's: 1000 classes, of one small image in either split."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "validation"):
        write_images(folder / split, num_classes=1000, side=40)
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    for split in ("train", "test"):
        write_images(folder / split, num_classes=10, side=32)
    return folder


@pytest.fixture(scope="module")
def stock_weights(tmp_path_factory):
    """Gives a file of weights for a stock model, with band-pass filters in its stem as training makes them."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def write(model: str) -> Path:
        stock = timm.create_model(model.removeprefix("mixpool_").split(".")[0])
        mixpool.initialize(stock, "gabor", num_channels=24, pooling="max")
        mixpool.revert(stock)
        path = folder / f"{model}.pth"
        torch.save(stock.state_dict(), path)
        return path

    return write


def dry_run(config: Path, data: Path, *more: str) -> int:
    settings = ("--data-dir", str(data), "--device", "cpu", "--workers", "0", "--batch-size", "4")
    return cli.main(["train", "-c", str(config), *settings, *more, "--dry-run"])


@EVERY_CONFIG
def test_dry_run(config, request, stock_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = read_config(config)
    is_cifar = config in CIFAR
    more = [] if is_cifar else ["--img-size", "64"]
    if settings.get("pretrained"):
        more += ["--pretrained-path", str(stock_weights(settings["model"]))]
    code = dry_run(config, request.getfixturevalue("cifar" if is_cifar else "imagenet"), *more)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert re.search(r"stem .*: [1-9]\d* of 64 channels pool by a modulus", out), out
    assert f"it would train {settings['epochs']} epochs and write to output/{config.stem}" in out
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("config", [path for path in CONFIGS if "distill" in header(path)], ids=lambda path: path.stem)
def test_dry_run_with_the_stock_model_as_teacher(config, imagenet, stock_weights, capsys):
    weights = stock_weights(read_config(config)["model"])
    more = ["--img-size", "64", "--pretrained-path", str(weights), "--distill", "stock"]
    assert dry_run(config, imagenet, *more) == 0, capsys.readouterr().err


def test_a_config_that_fails_fails_the_dry_run(cifar, tmp_path, capsys):
    config = tmp_path / "wrong.yaml"
    config.write_text(CIFAR[0].read_text().replace("num_classes: 10", "num_classes: 11"))
    assert dry_run(config, cifar) == EXIT_USER_ERROR
    assert "num_classes: 10" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cifar_photos(shared_data, tmp_path_factory) -> Path:
    """Two photos per class and split of CIFAR-10."""
    archive = shared_data / "cifar10_jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"cifar10/(train|test)/\w+/000[01]\.jpg", member.name):
                tar.extract(member, folder, filter="data")
    return folder / "cifar10"


@pytest.mark.parametrize("config", CIFAR, ids=lambda path: path.stem)
def test_dry_run_on_photos(config, cifar_photos, capsys):
    assert dry_run(config, cifar_photos) == 0
    assert "20 training and 20 validation images" in capsys.readouterr().out


# --- timm's script ----------------------------------------------------------------------------------------------------


def timm_defaults(config: Path) -> Namespace:
    """The file over the defaults of timm's script, as its argument parser leaves them for these keys."""
    defaults = {name: option.default for name, option in OPTIONS.items() if name not in GROUPS["mixpool"]}
    return Namespace(**{**defaults, "drop": 0.0, **yaml.safe_load(config.read_text())})


def build_as_timm(args: Namespace, **factory) -> torch.nn.Module:
    """The model as timm's script builds it, in the two ways that its releases have."""
    for name in args.device_modules:
        importlib.import_module(name)
    common = {
        "pretrained": args.pretrained,
        "num_classes": args.num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        "drop_block_rate": args.drop_block,
        "global_pool": args.gp,
        "bn_momentum": args.bn_momentum,
        "bn_eps": args.bn_eps,
        "scriptable": False,
        "checkpoint_path": args.initial_checkpoint,
        **factory,
        **args.model_kwargs,
    }
    earlier = timm.create_model(args.model, in_chans=3, **common)
    later = timm.create_model(**resolve_model_input_args(args.model, vars(args), **common))
    assert earlier.state_dict().keys() == later.state_dict().keys()
    return later


@EVERY_CONFIG
def test_timm_script_builds_model_optimizer_and_schedule(config, stock_weights):
    args = timm_defaults(config)
    file = stock_weights(args.model) if args.pretrained else None
    model = build_as_timm(args, **({"pretrained_cfg_overlay": {"file": str(file)}} if file else {}))
    assert sum(stem.num_complex for stem in converted_stems(model).values()) > 0
    if "alexnet" in config.stem:
        dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert dropouts == [0.5, 0.5], "timm's default of no dropout takes none away"
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, args.num_classes or 1000)
    args.lr = args.lr_base if args.lr is None else args.lr
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    _, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=100)
    assert num_epochs == args.epochs


def rates(config: Path, batch_size: int) -> list[float]:
    """The learning rate at the start of every epoch, for one process."""
    from mixpool.training.run import learning_rate

    options = parse(["-c", str(config), "--batch-size", str(batch_size)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate(options, world_size=1))
    schedule, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(options), updates_per_epoch=10)
    found = []
    for epoch in range(num_epochs):
        schedule.step_update(10 * epoch)
        schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_rates_of_the_paper():
    """Leterme et al.: 0.1, for AlexNet 0.01, at 256 images; a tenth of it every 30 epochs, on CIFAR-10 every 100."""
    for name, first, length in (
        ("imagenet_resnet34_scratch", 0.1, 30),
        ("imagenet_alexnet_scratch", 0.01, 30),
        ("cifar10_resnet18", 0.1, 100),
    ):
        expected = [first * 0.1**step for step in range(3) for _ in range(length)]
        assert rates(ROOT / "configs" / f"{name}.yaml", batch_size=256) == pytest.approx(expected)
        half = rates(ROOT / "configs" / f"{name}.yaml", batch_size=128)
        assert half == pytest.approx([rate / 2 for rate in expected])


def test_rates_of_the_cheap_recipe():
    found = rates(ROOT / "configs" / "imagenet_resnet18_16epochs.yaml", batch_size=1024)
    assert max(found) == pytest.approx(0.5 * 14 / 16) and found[0] < 1e-3
    steps = [before - after for before, after in zip(found[2:], found[3:])]
    assert steps == pytest.approx([0.5 / 16] * len(steps))


# --- docs/training.md -------------------------------------------------------------------------------------------------

GUIDE = ROOT / "docs" / "training.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert found
    return found


def test_the_commands_of_the_guide_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = "".join(blocks("shell")).splitlines()
    commands = [line.partition("mixpool train ")[2] for line in lines if "mixpool train " in line]
    assert len(commands) + sum("pytorch-image-models" in line for line in lines) == len(lines)
    for command in commands:
        assert parse(shlex.split(command, comments=True)).data_dir in ("imagenet", "cifar10")


def test_the_guide_is_short_and_names_every_configuration():
    text = GUIDE.read_text()
    assert len(text.splitlines()) <= 200
    assert {path.stem for path in CONFIGS} == set(re.findall(r"(?<=`)(?:imagenet|cifar10)_\w+(?=`)", text))


def test_the_snippets_of_the_guide_run(tmp_path, monkeypatch):
    """On a checkpoint as the guide's run writes it, but of a model that was not trained."""
    import mixpool.timm_models  # noqa: F401

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "output" / "cifar10_resnet18_30epochs"
    folder.mkdir(parents=True)
    trained = timm.create_model("mixpool_resnet18", num_classes=10, select="all").eval()
    torch.save({"state_dict": trained.state_dict()}, folder / "model_best.pth.tar")
    names: dict = {}
    for snippet in blocks("python"):
        exec(compile(snippet, str(GUIDE), "exec"), names)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = trained(x)
        assert torch.equal(names["model"].eval()(x), expected)
        assert torch.equal(names["same"].eval()(x), expected)
    assert names["same"].pretrained_cfg["input_size"] == (3, 32, 32)
