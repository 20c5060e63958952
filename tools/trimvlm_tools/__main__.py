"""`python -m trimvlm_tools` is `trimvlm`; launchers of several processes (torchrun) need a module."""

import sys

from trimvlm_tools.cli import main

sys.exit(main())
