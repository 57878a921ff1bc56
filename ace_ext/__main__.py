"""``python -m ace_ext`` is the command line ``ace-prune``."""

import sys

from ace_ext.cli.main import main

sys.exit(main())
