"""``python -m realuid_fast`` is the command ``realuid-fast``."""

import sys

from realuid_fast.cli import main

sys.exit(main())
