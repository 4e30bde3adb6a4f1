"""Options from YAML files and from the command line, and what is said of the rest."""

from __future__ import annotations

import pytest
from training_runs import parse

from mixpool.training.configuration import read_config
from mixpool.training.options import OPTIONS


def config(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    path = config(tmp_path, "lr: 0.5\nepochs: 7\namp: true\n")
    options = parse(["-c", str(path), "--epochs", "9", "--no-amp", "--no-aug"])
    assert (options.lr, options.epochs, options.amp, options.no_aug) == (0.5, 9, False, True)
    assert options.momentum == OPTIONS["momentum"].default


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    found = read_config(config(tmp_path, "lr: 1e-3\nweight_decay: 5e-4\nepochs: 30\nscale: [1e-1, 1]\n"))
    assert found == {"lr": 0.001, "weight_decay": 0.0005, "epochs": 30, "scale": [0.1, 1.0]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 0.1", "unknown key 'learning_rate'"),
        ("weigth_decay: 0.1", "did you mean weight_decay"),
        ("aug_splits: 3", "a key of timm's train.py that mixpool train does not have"),
        ("epochs: many", "expected epochs to be an integer, got 'many'"),
        ("epochs: .inf", "expected epochs to be an integer, got inf"),
        ("epochs: 1.5", "expected epochs to be an integer, got 1.5"),
        ("amp: 1", "expected amp to be true or false, got 1"),
        ("amp: 'yes'", "expected amp to be true or false, got 'yes'"),
        ("lr: true", "expected lr to be a number, got True"),
        ("scale: 0.5", "expected scale to be 2 times a number, got 0.5"),
        ("scale: [0.1, 0.5, 1]", "expected scale to be 2 times a number"),
        ("model_kwargs: rest=max", "expected model_kwargs to be a mapping"),
        ("clip_mode: norms", "expected clip_mode to be one of 'norm', 'value', 'agc'"),
        ("epochs:", "expected epochs to be an integer, got None"),
        ("lr: 0.1\nlr: 0.2", "lr given twice"),
        ("just text", "expected `key: value` lines"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_a_file_cannot_say(tmp_path, text, message):
    with pytest.raises(ValueError, match="config.yaml") as caught:
        read_config(config(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "expected batch_size to be 1 or more, got 0"),
        (["--workers", "-1"], "expected workers not to be negative"),
        (["--lr", "fast"], "invalid float value"),
        (["--lr", "nan"], "expected lr to be a finite number"),
        (["--smoothing", "1.5"], "expected smoothing to be a share from 0 to 1"),
        (["--mixup", "-1"], "expected mixup to be a finite number that is not negative"),
        (["--opt-betas", "0.9"], "expected 2 arguments"),
        (["--on-error", "ignore"], "expected on_error to be 'raise' or 'skip'"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--model-kwargs", "rest"], "expected NAME=VALUE"),
        (["--convert-images", "10"], "expected `convert` beside convert_images"),
        (["--clip-mode", "x"], "invalid choice"),
        (
            ["--model", "mixpool_resnet18", "--model-kwargs", "max_blur=3"],
            'instead of max_blur=3 write rest="blurpool"',
        ),
        (["--convert", "blur=1"], 'instead of blur=1 write pooling="cmod"'),
    ],
)
def test_what_the_command_line_cannot_say(arguments, message):
    with pytest.raises(ValueError, match="(?s).") as caught:
        parse(arguments)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        parse(["-c", str(tmp_path / "nowhere.yaml")])


def test_pairs_on_the_command_line_have_the_values_of_yaml():
    options = parse(["--model-kwargs", "num_bank=24", "rest=max", "aa_layer=null", "--convert", "select=[true, false]"])
    assert options.model_kwargs == {"num_bank": 24, "rest": "max", "aa_layer": None}
    assert options.convert == {"select": [True, False]}


def test_other_models_may_have_arguments_of_these_names():
    assert parse(["--model", "resnet18", "--model-kwargs", "blur=1"]).model_kwargs == {"blur": 1}
