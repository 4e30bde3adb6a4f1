"""A small data set, and runs of three epochs on it in this process and in others, for the tests of `mixpool train`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mixpool.cli import main
from mixpool.training import train
from mixpool.training.configuration import Parser, add_options, complete

CPU = torch.device("cpu")
TESTS = Path(__file__).parent
CLASSES = ("cat", "dog", "frog", "ship")


def write_photos(folder: Path) -> Path:
    """24 training and 9 validation images of 40 pixels in four classes that differ in colour and stripes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count - (split == "validation" and label >= 1)):
                pixels = torch.rand(40, 40, 3, generator=generator) * 120
                pixels[:, :: label + 2] += 100
                Image.fromarray(pixels.byte().numpy()).save(folder / split / name / f"{number}.png")
    return folder


def arguments(photos: Path, output: Path, **settings) -> list[str]:
    """The command line of a run of three epochs of three updates."""
    settings = {
        "device_modules": "tiny_models",
        "model": "tiny_stem",
        "data_dir": photos,
        "output": output,
        "experiment": "run",
        "device": "cpu",
        "workers": 0,
        "batch_size": 8,
        "epochs": 3,
        "warmup_epochs": 0,
        "lr": 0.05,
        "log_interval": 1,
    } | settings
    found = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            found.append("--no-" + flag[2:])
        else:
            found += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def parse(given: list[str]) -> argparse.Namespace:
    """The options of a command line, as `mixpool train` reads them."""
    parser = Parser(prog="mixpool train", allow_abbrev=False)
    add_options(parser)
    return complete(vars(parser.parse_args(given)))


def options(photos: Path, output: Path, **settings) -> argparse.Namespace:
    """The options of that run."""
    return parse(arguments(photos, output, **settings))


def touch_curves(folder: Path, history: list, title: str) -> None:
    """Instead of `draw_curves`, which takes longer than these epochs take to train."""
    (folder / "curves.png").touch()


# --- runs in processes of their own -----------------------------------------------------------------------------------

# A server that has imported everything forks them: what they do is the command's, and torch is imported only once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["mixpool.cli", "mixpool.training.train", "torch._dynamo", "timm.task", "timm.data", "mixpool.figures", "filelock"]
)


@dataclass
class Running:
    """The processes of a run, and the file into which the first of them writes."""

    processes: list[multiprocessing.Process]
    log: Path

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """As `kill -9`."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self) -> str:
        """What it prints."""
        for process in self.processes:
            process.join(timeout=120)
        text = self.log.read_text()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), text
        return text


def start(photos: Path, output: Path, *, processes: int = 1, **settings) -> Running:
    """The command `mixpool train` in one process or, with what torchrun tells each of them, in several."""
    output.mkdir(exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])  # of the server, at the first call
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        environment = {name: str(value) for name, value in (told | {"MASTER_PORT": port}).items()}
        log = output / f"log-{rank}.txt"
        command = ["train", *arguments(photos, output, **settings)]
        started.append(FORKS.Process(target=_work, args=(command, environment if processes > 1 else {}, log)))
        started[-1].start()
    return Running(started, output / "log-0.txt")


def _work(command: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders' workers, as in a process of its own
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    train.draw_curves = touch_curves
    sys.exit(main(command))
