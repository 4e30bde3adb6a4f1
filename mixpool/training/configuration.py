"""The options of a run, read from a YAML file and the command line.

A configuration that runs here also runs under timm's own script (`device_modules: [mixpool.timm_models]`); where that
ignores a key it does not know, this raises.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixpool.ops.renamed import SPELLED_NOW, spelled
from mixpool.training.options import GROUPS, OPTIONS, TIMM_ONLY, Option


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser these options; it leaves out of its result what was not given."""
    parser.add_argument("-c", "--config", metavar="FILE", default=None, help="YAML file of options")
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, option in options.items():
            _add(group, name, option)


def complete(given: Mapping[str, Any]) -> argparse.Namespace:
    """What was given on the command line, filled up from its YAML file (`config`) and the defaults.

    Raises:
        ValueError: an unknown key, or a value of the wrong kind; the message names the key and what was expected.
        FileNotFoundError: no such configuration.
    """
    config = given.get("config")
    settings = {name: copy.copy(option.default) for name, option in OPTIONS.items()}
    settings |= {} if config is None else read_config(config)
    settings |= {name: value for name, value in given.items() if name in OPTIONS}
    settings["config"] = config
    _check_ranges(settings)
    _check_renamed(settings)
    return argparse.Namespace(**settings)


class Parser(argparse.ArgumentParser):
    """Its errors are exceptions, as all others are; who has the terminal decides how to say them."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _add(group, name: str, option: Option) -> None:
    flag = "--" + name.replace("_", "-")
    default = "" if option.default in (None, "", {}, False) else f" (default: {_shown(option.default)})"
    text = (option.help + default).replace("%", "%%")
    common = {"help": text, "default": argparse.SUPPRESS}
    if option.kind is bool:
        # `--amp` and `--no-amp`, so that the command line can take back what the file says; but no `--no-no-aug`.
        action = "store_true" if name.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, **common)
    elif option.kind is dict:
        group.add_argument(flag, action=_Pairs, nargs="*", metavar="NAME=VALUE", **common)
    else:
        metavar = {int: "N", float: "X", str: "TEXT"}[option.kind]
        choices = {"metavar": metavar} if option.choices is None else {"choices": option.choices}
        group.add_argument(flag, type=option.kind, nargs=option.many, **choices, **common)


class _Pairs(argparse.Action):
    """`name=value` pairs, the values as YAML reads them."""

    def __call__(self, parser, namespace, values, option_string=None):
        import yaml

        pairs = {}
        for value in values:
            name, equals, text = value.partition("=")
            if not equals or not name:
                raise argparse.ArgumentError(self, f"expected NAME=VALUE, got {value!r}")
            try:
                pairs[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise argparse.ArgumentError(self, f"cannot read the value in {value!r}") from error
        setattr(namespace, self.dest, pairs)


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, each of the kind it has to be; errors as for `complete`."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a YAML file of options, but {path} does not exist")
    try:
        content = yaml.load(path.read_text(), Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected `key: value` lines in {path}, got {type(content).__name__}")
    return {key: checked(key, value, path) for key, value in content.items()}


def _loader():
    """PyYAML's safe loader, but a key given twice is an error, where it silently takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise yaml.YAMLError(f"{', '.join(twice)} given twice")
            return super().construct_mapping(node, deep)

    return Loader


def checked(key: str, value: Any, source: str | Path) -> Any:
    """The value of a key as its kind asks for; text such as `1e-3`, which YAML does not take for a number, is read."""
    option = OPTIONS.get(key)
    if option is None:
        raise ValueError(f"{source}: {_unknown(key)}")
    if value is None and option.default is None:
        return None
    try:
        if option.many is None:
            result = _one(option, value)
        else:
            if not isinstance(value, (list, tuple)) or (isinstance(option.many, int) and len(value) != option.many):
                raise ValueError
            result = [_one(option, item) for item in value]
    except (ValueError, TypeError, OverflowError):
        count = {None: "", "+": "a list of "}.get(option.many, f"{option.many} times ")
        kind = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
        raise ValueError(f"{source}: expected {key} to be {count}{kind[option.kind]}, got {value!r}") from None
    if option.choices is not None and result not in option.choices:
        raise ValueError(f"{source}: expected {key} to be one of {', '.join(map(repr, option.choices))}, got {value!r}")
    return result


def _one(option: Option, value: Any) -> Any:
    if option.kind in (bool, dict):
        if not isinstance(value, option.kind):
            raise ValueError
        return value
    if value is None or isinstance(value, (bool, dict, list)):
        raise ValueError
    if option.kind is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return option.kind(value)


def _unknown(key: str) -> str:
    if key in TIMM_ONLY:
        return f"{key!r} is a key of timm's train.py that mixpool train does not have"
    close = difflib.get_close_matches(str(key), OPTIONS, n=2)
    return f"unknown key {key!r}" + (f", did you mean {' or '.join(close)}?" if close else "")


def _check_ranges(settings: dict[str, Any]) -> None:
    for name in ("batch_size", "epochs", "grad_accum_steps", "val_interval", "log_interval", "lr_base_size"):
        if settings[name] < 1:
            raise ValueError(f"expected {name} to be 1 or more, got {settings[name]}")
    for name in ("workers", "recovery_interval", "stop_after", "convert_images", "warmup_epochs"):
        if settings[name] < 0:
            raise ValueError(f"expected {name} not to be negative, got {settings[name]}")
    for name in ("smoothing", "reprob", "hflip", "vflip", "mixup_prob", "mixup_switch_prob"):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"expected {name} to be a share from 0 to 1, got {settings[name]}")
    for name in ("mixup", "cutmix", "weight_decay", "min_lr", "lr", "lr_base"):
        if settings[name] is not None and not 0 <= settings[name] < math.inf:
            raise ValueError(f"expected {name} to be a finite number that is not negative, got {settings[name]}")
    if settings["on_error"] not in ("raise", "skip"):
        raise ValueError(f"expected on_error to be 'raise' or 'skip', got {settings['on_error']!r}")
    if settings["restart"] and settings["resume"]:
        raise ValueError("expected restart, which forgets, or resume, which continues, got both")
    if settings["convert_images"] and settings["convert"] is None:
        raise ValueError("expected `convert` beside convert_images, which says on how many images to select channels")


def _check_renamed(settings: dict[str, Any]) -> None:
    """Refuse keywords of version 0.1 now: the model itself would do so after the data set was opened."""
    arguments = dict(settings["convert"] or {})
    if settings["model"].startswith("mixpool_"):
        arguments |= settings["model_kwargs"]
    for name in arguments.keys() & SPELLED_NOW.keys():
        value = arguments[name]
        now = spelled(SPELLED_NOW[name], value)
        raise ValueError(f"{name} is a word of version 0.1: instead of {name}={value} write {now}")


def _shown(value: Any) -> str:
    return " ".join(f"{item:.4g}" for item in value) if isinstance(value, list) else str(value)
