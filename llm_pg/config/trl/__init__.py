"""The arguments of TRL 1.16's configs and trainers, and what each becomes here. TRL is not imported."""

from .facts import FACTS, as_dict, as_json
from .schedule import TrlSchedule
from .trainer import TRAINER
from .translate import WORDS, translate
from .words import Word

__all__ = ["FACTS", "TRAINER", "WORDS", "TrlSchedule", "Word", "as_dict", "as_json", "translate"]
