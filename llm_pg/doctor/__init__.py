"""Rules on configs and on runs. Each finding names its cause, the evidence, what to change and a source.

    from llm_pg.doctor import examine_config, examine_run
    for finding in examine_run("runs/x"):
        print(finding)

Imports no torch.
"""

from .finding import Finding, by_gravity, show
from .live import LIVE_RULES, examine, examine_run
from .static import STATIC_RULES, arithmetic, examine_config

__all__ = [
    "LIVE_RULES",
    "STATIC_RULES",
    "Finding",
    "arithmetic",
    "by_gravity",
    "examine",
    "examine_config",
    "examine_run",
    "show",
]
