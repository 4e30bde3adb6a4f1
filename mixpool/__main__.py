"""`python -m mixpool` is the command `mixpool`."""

import sys

from mixpool.cli import main

sys.exit(main())
