import sys

from ace_ext.cli.main import main

sys.exit(main())
