"""The command."""

import sys

from pipeline.contracts.environment.check import main

sys.exit(main())
