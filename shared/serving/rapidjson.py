"""JSON as RapidJSON reads it, the library below TensorFlow Serving: the same values, errors and offsets.

Python's own scanner reads what is well formed; `walk` reads again what that one gives up, to any depth, and knows
RapidJSON's errors. Integers stay integers, NaN and infinities are numbers, and a repeated key is not lost: an object is
a dict, or a tuple of pairs where it repeats a key.
"""

import json
import math
import re
from typing import Any

from shared.serving.refusal import RefusedError, invalid

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_CONSTANT = re.compile(r"(-?)(NaN|Inf(?:inity)?)")
_STRING = re.compile(
    r'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F])|.)", re.DOTALL)


def text_of(body: bytes) -> str:
    """The text of a body, which is UTF-8 as far as its document reaches; RefusedError where it is not, or empty."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        # What stands behind the document is nobody's business, so only a document that reaches so far is refused.
        text = body[: error.start].decode()
        try:
            walk(text.removeprefix("\ufeff"))
        except RefusedError:
            raise invalid(f"JSON Parse error: Invalid encoding in string. at offset: {error.start}") from None
    return text.removeprefix("\ufeff")


def parse(text: str) -> Any:
    """The value at the start of a text; what follows it is nobody's business. RefusedError where there is none."""
    try:
        document, _ = _DECODER.raw_decode(text, _SPACE.match(text).end())
        if ("\\ud" in text or "\\uD" in text) and any(_ESCAPE.findall(text)):
            document = walk(text)
    except (ValueError, RecursionError):  # not JSON, or a number of too many digits; or too deep
        document = walk(text)
    return document


def _keyed(pairs: list[tuple[str, Any]]) -> dict | tuple:
    found = dict(pairs)
    return found if len(found) == len(pairs) else tuple(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_keyed)


def pairs(value: dict | tuple) -> tuple[tuple[str, Any], ...]:
    """The members of an object."""
    return value if type(value) is tuple else tuple(value.items())


def first(value: dict | tuple) -> dict:
    """Of members with the same key the first."""
    return dict(reversed(value)) if type(value) is tuple else value


def walk(text: str) -> Any:
    """As `parse`, without recursion, and stricter about numbers: one beyond every double is refused, as is upstream."""
    position = _SPACE.match(text).end()
    if text[position : position + 1] in ("", "\0", "]", "}", ",", ":"):
        raise _broken(text, "The document is empty.", position)
    stack: list[tuple[str, list]] = []  # what closes a container, and its elements, or keys and values in turn
    awaited = "value"
    while True:
        sign = text[position : position + 1]
        if stack and sign == stack[-1][0] and awaited in ("first", "next"):
            _, value = stack.pop()
            value = value if sign == "]" else _keyed(list(zip(value[::2], value[1::2], strict=True)))
            position += 1
        elif awaited == "next":
            if sign != ",":
                closing, owner = ("}", "object member") if stack[-1][0] == "}" else ("]", "array element")
                raise _broken(text, f"Missing a comma or '{closing}' after an {owner}.", position)
            awaited = "name" if stack[-1][0] == "}" else "value"
            position = _SPACE.match(text, position + 1).end()
            continue
        elif awaited == "name" or (awaited == "first" and stack[-1][0] == "}"):
            if sign != '"':
                raise _broken(text, "Missing a name for object member.", position)
            name, position = _scalar(text, position)
            position = _SPACE.match(text, position).end()
            if text[position : position + 1] != ":":
                raise _broken(text, "Missing a colon after a name of object member.", position)
            stack[-1][1].append(name)
            awaited = "value"
            position = _SPACE.match(text, position + 1).end()
            continue
        elif sign in ("[", "{"):
            stack.append(("]" if sign == "[" else "}", []))
            awaited = "first"
            position = _SPACE.match(text, position + 1).end()
            continue
        else:
            value, position = _scalar(text, position)
        if not stack:
            return value
        stack[-1][1].append(value)
        awaited = "next"
        position = _SPACE.match(text, position).end()


def _scalar(text: str, start: int) -> tuple[Any, int]:
    if text.startswith('"', start):
        end = _STRING.match(text, start).end()
        if text.startswith('"', end):
            return json.decoder.scanstring(text, start + 1)
        if text[end : end + 1] in ("", "\0"):
            raise _broken(text, "Missing a closing quotation mark in string.", end)
        if re.compile(r"\\u[0-9a-fA-F]{4}").match(text, end):
            raise _broken(text, "The surrogate pair in string is invalid.", end)
        if text.startswith("\\u", end):
            raise _broken(text, "Incorrect hex digit after \\u escape in string.", end)
        raise _broken(text, "Invalid escape character in string.", end)
    for word, value in (("null", None), ("true", True), ("false", False)):
        if text.startswith(word[0], start):
            if text.startswith(word, start):
                return value, start + len(word)
            read = next(index for index in range(len(word)) if not text.startswith(word[: index + 1], start))
            raise _broken(text, "Invalid value.", start + read)
    if found := _CONSTANT.match(text, start):
        return (math.nan if found[2] == "NaN" else float(found[1] + "inf")), found.end()
    found = _NUMBER.match(text, start)
    if not found:
        raise _broken(text, "Invalid value.", start + text.startswith("-", start))
    end = found.end()
    if text.startswith(".", end) and not found[1]:
        raise _broken(text, "Miss fraction part in number.", end + 1)
    if text[end : end + 1] in ("e", "E") and not re.search("[eE]", found[1]):
        raise _broken(text, "Miss exponent in number.", end + 1 + (text[end + 1 : end + 2] in ("+", "-")))
    # 20 characters hold every 64-bit integer; longer ones are doubles, and Python would refuse the longest.
    number = int(found[0]) if not found[1] and len(found[0]) <= 20 else float(found[0])
    if math.isinf(number):
        raise _broken(text, "Number too big to be stored in double.", start)
    return number, end


def _broken(text: str, reason: str, position: int) -> RefusedError:
    return invalid(f"JSON Parse error: {reason} at offset: {len(text[:position].encode())}")
