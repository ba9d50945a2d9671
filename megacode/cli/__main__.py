"""`python -m megacode.cli`, as torchrun starts it."""

import sys

from megacode.cli.main import main

sys.exit(main())
