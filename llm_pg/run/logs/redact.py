"""Secrets stay out of what a run writes and prints: names that mean a secret, what is in such variables of the
environment, and the user part and query of URLs."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(
    r"(^|[_\-. ])(api_?key|access_?key|secret_?key|private_?key|secret|token|password|passwd|passphrase|credentials?|"
    r"authorization|bearer|auth)s?$",
    re.IGNORECASE,
)
# Words of a vocabulary, which share their names with secrets.
_VOCABULARY = re.compile(
    r"(^|[_\-. ])(eos|bos|pad|unk|sep|cls|mask|stop|start|end|image|audio|think|additional_special|special)_tokens?$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)", re.I)
# Each character is looked at a bounded number of times: a model may say "????..." for thousands of tokens.
_URL_USER = re.compile(r"://[^/\s'\"]+@")
_URL_QUERY = re.compile(r"([?&]([^=&?\s]+)=)[^&\s'\"]+")
_SECRET_QUERY = re.compile("token|key|secret|password|passwd|signature|sig|auth", re.IGNORECASE)
_SHORTEST = 6  # a shorter value would blot out ordinary text


def is_secret_name(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.search(name)


class Redactor:
    """Replaces secrets in texts and in trees of JSON.

    Args:
        tree: settings to look through for values whose names mean a secret; these are then hidden wherever they appear.
    """

    def __init__(self, tree: Any = None) -> None:
        found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
        _collect(tree, found)
        # Longest first, so that a secret inside another leaves no rest.
        self._values = sorted((v for v in found if len(v) >= _SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return _URL_QUERY.sub(_without_value, _URL_USER.sub(f"://{HIDDEN}@", text))

    def tree(self, value: Any, name: str = "") -> Any:
        """A copy in which every secret string is replaced; numbers and None stay."""
        if isinstance(value, dict):
            return {self.text(k) if isinstance(k, str) else k: self.tree(v, _inner(name, k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(v, name) for v in value]
        if isinstance(value, str):
            return HIDDEN if value and is_secret_name(name) else self.text(value)
        return value

    def traceback(self, error: BaseException) -> str:
        return self.text("".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def guard_process(self) -> None:
        """Hide secrets in what an uncaught exception and this package's warnings print, from now on."""

        def show(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
            sys.stderr.write(self.text("".join(traceback.format_exception(kind, error, at))))

        sys.excepthook = show
        for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "llm_pg"]:
            logging.getLogger(name).addFilter(self._clean_record)

    def _clean_record(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.text(record.getMessage()), ()
        return True


def _without_value(parameter: re.Match[str]) -> str:
    return parameter[1] + HIDDEN if _SECRET_QUERY.search(parameter[2]) else parameter[0]


def _inner(name: str, key: Any) -> str:
    """What names a value in a mapping: of one that is secret as a whole, the mapping's own name."""
    return name if is_secret_name(name) else str(key)


def _collect(tree: Any, found: set[str], name: str = "") -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _collect(value, found, _inner(name, key))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            _collect(value, found, name)
    elif isinstance(tree, str) and is_secret_name(name):
        found.add(tree)
