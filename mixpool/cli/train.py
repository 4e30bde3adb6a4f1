"""The command `mixpool train`: its options are timm's keys, those of `training.options`."""

from __future__ import annotations

import argparse

from mixpool.training import configuration

HELP = "train or fine-tune a model"
DESCRIPTION = """Train or fine-tune a model on timm's parts. The same command again continues a run that was cut;
under torchrun it runs on several GPUs and nodes. The YAML file has timm's keys, and these options."""
EXAMPLES = """examples:
  mixpool train -c configs/imagenet_resnet34_finetune.yaml --data-dir imagenet --dry-run
  mixpool train -c configs/cifar10_resnet18_30epochs.yaml --data-dir cifar10 --device cpu
  torchrun --standalone --nproc_per_node=8 -m mixpool train -c configs/imagenet_resnet34_scratch.yaml"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mixpool train [-c FILE] [--KEY VALUE ...]"  # the options themselves would fill a page
    configuration.add_options(parser)


def run(options: argparse.Namespace) -> None:
    from mixpool.training.train import train

    train(configuration.complete(vars(options)))
