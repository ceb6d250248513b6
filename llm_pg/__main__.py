"""`python -m llm_pg` is the command `llm-pg`, so that `accelerate launch -m llm_pg train ...` works."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
