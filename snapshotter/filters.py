# SPDX-License-Identifier: Apache-2.0
"""containerd's filter grammar (containerd: pkg/filters), for List.

    filter    = condition *("," condition)               all must hold
    condition = path [("==" / "!=" / "~=") value]        alone: present and not empty
    path      = field *("." field), a field bare or quoted
A request's filters are alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from snapshotter.errors import InvalidArgument

_BARE: Final = re.compile(r"[A-Za-z0-9_]+")
_VALUE: Final = re.compile(r"[^,\s\"]+")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|/((?:[^/\\]|\\.)*)/|\|((?:[^|\\]|\\.)*)\|', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_PLAIN: Final = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_TEXT_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    parent: str
    kind: str  # "active", "view" or "committed"
    labels: Mapping[str, str]

    def value(self, path: tuple[str, ...]) -> str | None:
        """None where the field is absent."""
        if len(path) == 1 and path[0] in ("name", "parent", "kind"):
            return str(getattr(self, path[0])) or None
        if len(path) > 1 and path[0] == "labels":
            return self.labels.get(".".join(path[1:]))
        return None


Predicate = Callable[[Subject], bool]


def compile_filters(filters: Iterable[str]) -> Predicate:
    """Raises InvalidArgument, naming the filter and the place."""
    alternatives = [_Parser(text).filter() for text in filters if text]
    if not alternatives:
        return lambda subject: True
    return lambda subject: any(all(holds(subject) for holds in conditions) for conditions in alternatives)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        if len(text) > _TEXT_BYTES_MAX:
            raise InvalidArgument(f"filter of {len(text)} characters is over {_TEXT_BYTES_MAX}")

    def filter(self) -> list[Predicate]:
        conditions = [self._condition()]
        while self._skip(","):
            conditions.append(self._condition())
        if self._at != len(self._text):
            raise self._error("',' or the end")
        return conditions

    def _condition(self) -> Predicate:
        fields = [self._field()]
        while self._skip("."):
            fields.append(self._field())
        path = tuple(fields)
        for operator in ("==", "!=", "~="):
            if self._skip(operator):
                return self._compare(path, operator, self._value())
        return lambda subject: bool(subject.value(path))

    def _compare(self, path: tuple[str, ...], operator: str, value: str) -> Predicate:
        if operator == "==":
            return lambda subject: subject.value(path) == value
        if operator == "!=":
            return lambda subject: subject.value(path) != value
        try:
            pattern = re.compile(value)
        except (re.error, RecursionError, OverflowError):
            raise self._error("a regular expression") from None
        return lambda subject: (found := subject.value(path)) is not None and pattern.search(found) is not None

    def _field(self) -> str:
        self._blanks()
        if self._text[self._at : self._at + 1] == '"':
            return self._quoted()
        return self._match(_BARE, "a field")

    def _value(self) -> str:
        self._blanks()
        if self._text[self._at : self._at + 1] in ('"', "/", "|"):
            return self._quoted()
        return self._match(_VALUE, "a value")

    def _quoted(self) -> str:
        match = _QUOTED.match(self._text, self._at)
        if not match:
            raise self._error("the end of a quoted text")
        self._at = match.end()
        return _ESCAPE.sub(_unescape, next(group for group in match.groups() if group is not None))

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self._text, self._at)
        if not match:
            raise self._error(what)
        self._at = match.end()
        return match[0]

    def _skip(self, token: str) -> bool:
        self._blanks()
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _blanks(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1

    def _error(self, expected: str) -> InvalidArgument:
        return InvalidArgument(f"filter {self._text[:200]!r}: expected {expected} at {self._at}")


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "xuU" and len(code) > 1:
        return chr(min(int(code[1:], 16), 0x10FFFF))
    if len(code) == 3:
        return chr(int(code, 8))
    return _PLAIN.get(code, code)
