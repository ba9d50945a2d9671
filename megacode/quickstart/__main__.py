"""`python -m megacode.quickstart`, as tools/quickstart starts it."""

import sys

from megacode.quickstart.run import main

sys.exit(main())
