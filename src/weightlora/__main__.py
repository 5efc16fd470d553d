"""``python -m weightlora``, the same as ``weightlora``."""

import sys

from weightlora.cli import main

sys.exit(main())
