# SPDX-License-Identifier: Apache-2.0
"""containerd's filter grammar (containerd: pkg/filters), for List.

    filter    = condition *("," condition)               all must hold
    condition = path [("==" / "!=" / "~=") value]        alone: present
    path      = field *("." field), a field bare or quoted
    value     = bare or quoted; after "~=", an RE2 expression, also between slashes or bars
A request's filters are alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import re2

from snapshotter.errors import InvalidArgument

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
# A value begins with nothing that means something by itself.
_VALUE: Final = re.compile(r"[^,.=!~\s\"/|][^,\s]*")
_QUOTED: Final = {
    quote: re.compile(rf"{re.escape(quote)}((?:[^{re.escape(quote)}\\\n]|\\.)*){re.escape(quote)}") for quote in '"/|'
}
# Go's escapes and no others (strconv.UnquoteChar).
_ESCAPE: Final = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|(.))", re.DOTALL
)
_PLAIN: Final = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\"}
_TEXT_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    parent: str
    kind: str  # "active", "view" or "committed"
    labels: Mapping[str, str]

    def value(self, path: tuple[str, ...]) -> str | None:
        """None where the field is absent; a parent is there, if an empty one."""
        if len(path) == 1 and path[0] in ("name", "parent", "kind"):
            return str(getattr(self, path[0]))
        if len(path) > 1 and path[0] == "labels":
            return self.labels.get(".".join(path[1:]))
        return None


Predicate = Callable[[Subject], bool]


@dataclass(frozen=True, slots=True)
class _Condition:
    path: tuple[str, ...]
    holds: Predicate
    equals: str | None = None  # what the field must be, where that is all it says


class Filters:
    """What a request's filters let through."""

    def __init__(self, alternatives: Sequence[Sequence[_Condition]]) -> None:
        self._alternatives = alternatives

    def __call__(self, subject: Subject) -> bool:
        if not self._alternatives:
            return True
        return any(all(condition.holds(subject) for condition in all_of) for all_of in self._alternatives)

    def only(self, field: str) -> frozenset[str] | None:
        """The values of which the field has one, whatever passes; None where it may have any. An index finds those
        at once: what containerd asks after an ALREADY_EXISTS names one parent."""
        found = []
        for all_of in self._alternatives:
            value = next((each.equals for each in all_of if each.path == (field,) and each.equals is not None), None)
            if value is None:
                return None
            found.append(value)
        return frozenset(found) if found else None


def compile_filters(filters: Iterable[str]) -> Filters:
    """Raises InvalidArgument, naming the filter and the place."""
    return Filters([_Parser(text).filter() if text else [] for text in filters])


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        if len(text) > _TEXT_BYTES_MAX:
            raise InvalidArgument(f"filter of {len(text)} characters is over {_TEXT_BYTES_MAX}")

    def filter(self) -> list[_Condition]:
        conditions = [self._condition()]
        while self._skip(","):
            conditions.append(self._condition())
        if self._at != len(self._text):
            raise self._error("',' or the end")
        return conditions

    def _condition(self) -> _Condition:
        fields = [self._field()]
        while self._skip("."):
            fields.append(self._field())
        path = tuple(fields)
        if self._skip("=="):
            wanted = self._value('"')
            return _Condition(path, lambda subject: subject.value(path) == wanted, wanted)
        if self._skip("!="):
            unwanted = self._value('"')
            return _Condition(path, lambda subject: subject.value(path) != unwanted)
        if self._skip("~="):
            # RE2 takes linear time, whatever the expression: Python's own could stop the whole daemon.
            options = re2.Options()
            options.log_errors = False
            try:
                pattern = re2.compile(self._value('"/|'), options)
            except re2.error:
                raise self._error("a regular expression") from None
            return _Condition(path, lambda subject: pattern.search(subject.value(path) or "") is not None)
        return _Condition(path, lambda subject: subject.value(path) is not None)

    def _field(self) -> str:
        self._blanks()
        return self._quoted('"') if self._next() == '"' else self._match(_BARE, "a field")

    def _value(self, quotes: str) -> str:
        self._blanks()
        quote = self._next()
        return self._quoted(quote) if quote and quote in quotes else self._match(_VALUE, "a value")

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _quoted(self, quote: str) -> str:
        match = _QUOTED[quote].match(self._text, self._at)
        if not match:
            raise self._error("the end of a quoted text")

        def unescape(escape: re.Match[str]) -> str:
            two, four, eight, octal, plain = escape.groups()
            if plain is not None:
                if plain != quote and plain not in _PLAIN:
                    raise self._error(f"no escape \\{plain} in a quoted text")
                return _PLAIN.get(plain, plain)
            code = int(octal, 8) if octal else int(two or four or eight, 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise self._error("an escape for a character")
            return chr(code)

        text = _ESCAPE.sub(unescape, match[1])
        self._at = match.end()
        return text

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
        while self._next().isspace():
            self._at += 1

    def _error(self, expected: str) -> InvalidArgument:
        return InvalidArgument(f"filter {self._text[:200]!r}: expected {expected} at {self._at}")
