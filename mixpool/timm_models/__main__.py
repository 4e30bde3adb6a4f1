"""`python -m mixpool.timm_models SCRIPT ...`: run a script of timm's repository with the mixpool models registered.

timm's train.py imports what its option `device_modules` names; its validate.py, benchmark.py, inference.py and
onnx_export.py have no such option, and so know no `mixpool_*` models by themselves.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """usage: python -m mixpool.timm_models SCRIPT [ARGUMENTS ...]

Run a Python script, as one of timm's repository, with the mixpool_* models registered. What follows SCRIPT is the
script's own, --help too.

examples:
  python -m mixpool.timm_models validate.py --data-dir imagenet --model mixpool_resnet34 --checkpoint model_best.pth.tar
  python -m mixpool.timm_models benchmark.py --model mixpool_resnet50 --bench train --amp --channels-last
  torchrun --standalone --nproc_per_node=8 -m mixpool.timm_models train.py -c configs/imagenet_resnet34_finetune.yaml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script named first with the rest as its arguments; returns the exit code 0, or 2 for a user's error.

    The script runs as `python SCRIPT ...` would run it: as `__main__`, with its own `sys.argv` and its folder first in
    `sys.path`; both stay so afterwards. Its exceptions, and its `sys.exit`, pass through.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if arguments[0].startswith("-"):
        return _refuse(f"expected a script before the option {arguments[0]} (see --help)")
    if not script.is_file():
        what = "is a folder" if script.is_dir() else "does not exist"
        return _refuse(f"expected a script, but {script} {what}; timm's are in its repository, not in its wheel")

    sys.argv = arguments
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _refuse(message: str) -> int:
    print(f"mixpool.timm_models: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
