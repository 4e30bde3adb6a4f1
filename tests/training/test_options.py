"""What `mixpool train` accepts, from YAML files and from the command line, and what it says of the rest."""

from __future__ import annotations

from training_runs import parse

from mixpool.training.options import GROUPS, OPTIONS, TIMM_ONLY


def test_defaults_are_not_shared_between_runs():
    parse([]).model_kwargs["num_bank"] = 1
    parse([]).decay_milestones.append(1)
    assert parse([]).model_kwargs == {} and parse([]).decay_milestones == OPTIONS["decay_milestones"].default


def test_every_default_is_of_its_kind():
    for name, option in OPTIONS.items():
        values = option.default if option.many is not None and option.default is not None else [option.default]
        assert all(value is None or isinstance(value, option.kind) for value in values), name
    assert sum(len(group) for group in GROUPS.values()) == len(OPTIONS) and not TIMM_ONLY & set(OPTIONS)
