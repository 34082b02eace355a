"""Jinja's immutable sandbox with every operation metered, for templates nobody has read.

The sandbox keeps a template from Python's internals, but not from filling memory or
spinning: Python cannot interrupt ``'a' * 10**10`` or the printing of deeply shared lists once
begun. So each operation that makes data (operators, calls, filters, literals, output) is
charged to the active `Meter` before or as it makes it, loops and macros are charged at each
turn, and only methods and filters known to stay in proportion to their input are there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pronk.serve.meter import MOST_BITS, LimitError, Meter, RefusalError, weigh
from pronk.serve.metering import Metering

__all__ = ["MeteredEnvironment"]

_MOST_RANGE = 100_000
_MOST_WIDTH = 1000
_MOST_LAYOUT = 4096

# fmt: off
_STR = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index",
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower",
    "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
})
# fmt: on
_METHODS: tuple[tuple[tuple[type, ...], frozenset[str]], ...] = (
    ((str,), _STR),
    ((dict,), frozenset({"copy", "get", "items", "keys", "values"})),
    ((list, tuple), frozenset({"copy", "count", "index"})),
    ((int, float, complex, bytes, range, set, frozenset, type(None), datetime), frozenset()),
)
# fmt: off
_FILTERS = frozenset({
    "abs", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape",
    "first", "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum", "title", "tojson",
    "trim", "truncate", "unique", "upper", "urlencode",
})
# fmt: on
# Their integer arguments set the size of what they make.
_SIZED_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "truncate"})
_NUMBER = re.compile(r"[0-9]{4,}")


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    # Namespaces can hold one another many times over; their contents are never printed.
    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's words for training: plain text here."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        # What is set inside is not seen outside: transformers makes a call of it.
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > _MOST_RANGE:
        raise LimitError(f"its range is longer than {_MOST_RANGE}")
    return numbers


def _raise_exception(message: object) -> None:
    raise RefusalError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 200 or _NUMBER.search(layout):
        raise LimitError("its date format is too long")
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    meter = Meter.active()
    meter.weighed(value)
    if isinstance(indent, int):
        indent = " " * min(max(indent, 0), 17)
    if max(map(len, (indent or "", *(separators or ())))) > 16:
        raise LimitError("its indentation or separators are too long")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(meter.collected(encoder.iterencode(value)))


def _sum(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    for value in values:
        item = value if attribute is None else environment.getitem(value, attribute)
        total = environment.call_binop(None, "+", total, item)
    return total


def _check_spec(spec: str) -> None:
    if len(spec) > _MOST_LAYOUT:
        raise LimitError("it formats with too long a format string")
    if _NUMBER.search(spec):
        raise LimitError(f"it formats to a width of {_MOST_WIDTH} or more")


def _percent(layout: str, values: Any) -> str:
    meter = Meter.active()
    _check_spec(layout)
    if "*" in layout:
        raise LimitError("it formats to a width taken from its data")
    meter.charge(layout.count("%") * (_MOST_WIDTH + 2 * weigh(values, 2**40)))
    return str(layout % values)


def _replaced(text: str, old: Any, new: Any, *_: Any) -> None:
    new = str(new)
    places = text.count(str(old))
    Meter.active().charge(len(text) + places * len(new) * (1 if new.isascii() else 4))


def _split(text: str, separator: Any = None, *_: Any) -> None:
    pieces = len(text) // 2 if separator is None else text.count(separator)
    Meter.active().charge(64 * pieces + len(text))


def _joined(glue: str, items: list[Any]) -> None:
    Meter.active().charge(weigh(glue, 2**40) * len(items))


def _guard_str_method(
    name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Charge a method of a string before it runs, from what it is about to make."""
    meter = Meter.active()
    meter.charge(len(text) // 16)
    if name == "join":
        items = meter.collected(args[0])
        _joined(text, items)
        return (items, *args[1:])
    if name == "replace":
        _replaced(text, *args)
    elif name in {"split", "rsplit", "splitlines"}:
        _split(text, *(args if name != "splitlines" else ("\n",)))
    for pattern in (*args[:1], *kwargs.values()):
        if isinstance(pattern, str) and name not in {"startswith", "endswith", "format"}:
            meter.scan(len(text), len(pattern))
    return args


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled and rendered in, under an active `Meter`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._finalize,
            cache_size=0,
        )
        for name in list(self.filters):
            if name in _FILTERS:
                self.filters[name] = self._metered_filter(name, self.filters[name])
            else:
                del self.filters[name]
        self.tests = {name: _metered_test(test) for name, test in self.tests.items()}
        self.filters["tojson"] = _tojson
        self.filters["sum"] = jinja2.pass_environment(_sum)
        self.globals = {
            "range": _range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    # Compiling

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        Metering(self).visit(tree)
        return tree

    # Called by the compiled template

    def tick(self, size: int) -> str:
        """One turn of a loop or macro whose own text is `size` long."""
        Meter.active().charge(size)
        return ""

    def tilde(self, *values: Any) -> str:
        """The operator ``~``."""
        meter = Meter.active()
        return "".join(meter.collected(self._text(value) for value in values))

    def weighed(self, value: Any) -> Any:
        """A list, tuple or dict written out in the template."""
        return Meter.active().weighed(value)

    def _finalize(self, value: Any) -> Any:
        return Meter.active().weighed(value)

    def _text(self, value: Any) -> str:
        return str(Meter.active().weighed(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Any binary operator but ``~``, checked before it is carried out."""
        meter = Meter.active()
        if operator == "%" and isinstance(left, str):
            return meter.weighed(_percent(left, right))
        if operator in {"*", "**"}:
            _check_product(operator, left, right)
        elif operator == "+":
            meter.charge(0)
        return meter.weighed(super().call_binop(context, operator, left, right))

    # Jinja's own names, so that a template can pass keywords called anything.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Any call, charged for its result; a string's methods also beforehand."""
        meter = Meter.active()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _guard_str_method(getattr(__obj, "__name__", ""), owner, args, kwargs)
        elif isinstance(__obj, _Dict) and args:
            args = (meter.weighed(args[0]), *args[1:])
        return meter.weighed(super().call(__context, __obj, *args, **kwargs))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once what Jinja would let pass until it is used."""
        raise jinja2.exceptions.SecurityError(
            f"it asks for {attribute!r} of a {type(obj).__name__}"
        )

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only the methods in the tables above, for plain data."""
        for types, names in _METHODS:
            if isinstance(obj, types):
                return attr in names
        if isinstance(obj, _Dict):
            return attr == "fromkeys"
        if not type(obj).__module__.startswith(("jinja2.", "pronk.")):
            return False
        return bool(super().is_safe_attribute(obj, attr, value))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, its field widths limited and its output charged."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        layout: str = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_spec(layout)
            # A width can come from an argument only through a nested field.
            if re.search(r":[^{}]*\{", layout):
                raise LimitError("it formats to a width taken from its data")
            inputs = weigh([args, kwargs], 2**40)
            Meter.active().charge(layout.count("{") * (_MOST_WIDTH + 2 * inputs))
            return str(wrapped(*args, **kwargs))

        return formatted

    def _metered_filter(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        passes = getattr(inner, "jinja_pass_arg", None)

        def metered(*args: Any, **kwargs: Any) -> Any:
            meter = Meter.active()
            lead = (args[0],) if passes else ()
            value, *rest = args[len(lead) :]
            guard = _FILTER_GUARDS.get(name)
            if guard is not None:
                value = guard(value, *rest, **kwargs)
            if name in _SIZED_FILTERS:
                for option in (*rest, *kwargs.values()):
                    if isinstance(option, int) and abs(option) > _MOST_WIDTH:
                        raise LimitError(f"the filter {name} is given {option:.3g}")
            if isinstance(value, str):
                meter.charge(len(value))
            result = inner(*lead, value, *rest, **kwargs)
            return meter.weighed(result)

        if passes is not None:
            metered.jinja_pass_arg = passes  # type: ignore[attr-defined]  # Jinja looks for it
        return metered


def _metered_test(inner: Any) -> Callable[..., Any]:
    @functools.wraps(inner)
    def metered(*args: Any, **kwargs: Any) -> Any:
        # `select` and `reject` test item after item with no turn of a loop between.
        Meter.active().charge(0)
        return inner(*args, **kwargs)

    return metered


def _check_product(operator: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if operator == "**":
        if not numbers:
            raise TypeError("** takes numbers")
        size = abs(left).bit_length() * abs(right) if isinstance(left, int) else 0
        if isinstance(right, int) and size > MOST_BITS:
            raise LimitError("it makes too large a number")
    elif not numbers:
        times = left if isinstance(left, int) else right
        if isinstance(times, int):
            body = right if isinstance(left, int) else left
            Meter.active().charge(max(times, 0) * weigh(body, 2**40))


def _guard_join(value: Any, d: Any = "", attribute: Any = None) -> Any:
    items = Meter.active().collected(value)
    _joined(str(d), items)
    return items


def _guard_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else Meter.active().collected(value)


def _guard_replace(value: Any, old: Any, new: Any, count: Any = None) -> Any:
    _replaced(str(value), str(old), str(new))
    return value


def _guard_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> Any:
    text = str(value)
    size = len(width) if isinstance(width, str) else _MOST_WIDTH
    lines = 1 + sum(text.count(c) for c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
    # A plain integer width is checked below and mostly 4.
    size = min(size, abs(width)) if isinstance(width, int) else size
    Meter.active().charge(len(text) + lines * size)
    return value


def _guard_format(value: Any, *args: Any, **kwargs: Any) -> Any:
    _percent(str(value), kwargs or args)
    return value


def _guard_trim(value: Any, chars: Any = None) -> Any:
    if isinstance(chars, str):
        Meter.active().scan(len(str(value)), len(chars))
    return value


_FILTER_GUARDS: dict[str, Callable[..., Any]] = {
    "format": _guard_format,
    "indent": _guard_indent,
    "join": _guard_join,
    "list": _guard_list,
    "replace": _guard_replace,
    "trim": _guard_trim,
}
