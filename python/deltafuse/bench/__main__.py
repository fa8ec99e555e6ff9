"""`python -m deltafuse.bench OP`, for an installation without the command."""

import sys

from .main import main

sys.exit(main())
