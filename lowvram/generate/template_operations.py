"""The operators, methods, filters, tests and functions of chat templates; each checks its cost before it runs.

They are jinja2's own, except `tojson`, `strftime_now` and `raise_exception`, which are transformers'.  Left out are
jinja2's filters whose work cannot be predicted (pprint, striptags, urlize, wordwrap, xmlattr) and all methods that no
template needs.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Namespace

from lowvram.generate.template_budget import Budget

# More characters than f"{-1e308:f}" has: the most that one number adds to a formatted string, besides its width.
_LONGEST_NUMBER = 400
_SEARCHES = {"count", "endswith", "find", "index", "rfind", "rindex", "startswith"}
_TRIMMING = {"lstrip", "partition", "removeprefix", "removesuffix", "rpartition", "rsplit", "rstrip", "split", "strip"}
_PREDICATES = {
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isupper",
}
_MORE_PREDICATES = {"isprintable", "isspace", "istitle"}
_CHANGING = {"capitalize", "casefold", "lower", "splitlines", "swapcase", "title", "upper"}
_TEXT_METHODS = _SEARCHES | _TRIMMING | _PREDICATES | _MORE_PREDICATES | _CHANGING
_PADDINGS = {"center", "ljust", "rjust", "zfill"}
_METHODS: dict[type, set[str]] = {
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    range: {"count", "index"},
    float: {"is_integer"},
}
# Filters that read no more than one element, whatever the value's size.
_CHEAP = {"attr", "count", "d", "default", "first", "items", "last", "length", "random", "safe"}
# Filters that run Python code for each element, and their steps for one element.
_COSTLY = {
    **dict.fromkeys(("map", "reject", "rejectattr", "select", "selectattr"), 0.125),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "sum", "unique"), 8),
}
_LEFT_OUT = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
# Tests that read all of their operands.
_EQUALITY_TESTS = {"in", "==", "eq", "equalto", "!=", "ne", "lower", "upper"}
_ORDER_TESTS = {">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le"}


class BudgetedContext(Context):
    """The variables of one rendering, and its budget."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """Return a context for a block, which spends the same budget."""
        context = super().derived(locals)
        assert isinstance(context, BudgetedContext)
        context.budget = self.budget
        return context

    def step(self) -> bool:
        """Count a step; returns True, so that it can be a part of a condition."""
        self.budget.step()
        return True


class ShortNamespace(Namespace):
    """Jinja's namespace with a short printed form, whatever its attributes are."""

    def __repr__(self) -> str:
        return "<Namespace>"


class FormatMethod(NamedTuple):
    """A string's method format or format_map, not called yet."""

    text: str
    takes_table: bool


class BudgetedFormatter(SandboxedFormatter):
    """Python's own str.format, with each field checked against the budget."""

    def __init__(self, environment: SandboxedEnvironment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def format_text(self, form: FormatMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return `form.text.format(*args, **kwargs)`, or `form.text.format_map(args[0])`."""
        if form.takes_table:
            (kwargs,), args = args, ()
        return str(self.vformat(form.text, args, kwargs))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply !r, !s or !a."""
        self._budget.check_size(self._budget.size(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return one field's text, after checking the widths in its format."""
        self._budget.check_size(_sum_widths(format_spec) + self._budget.size(value) + _LONGEST_NUMBER)
        return self._budget.new(str(super().format_field(value, format_spec)))


def _sum_widths(form: str) -> int:
    """Return the sum of all numbers in a format; each may be a width or a precision."""
    # Ten digits are more than any limit.
    return sum(int(digits.lstrip("0")[:10] or "0") for digits in re.findall("[0-9]+", form))


@pass_context
def show_value(context: BudgetedContext, value: Any) -> Any:
    """Count what `{{ … }}` prints, and return it."""
    budget = context.budget
    if isinstance(value, str):
        budget.take(len(value))
        return value
    budget.check_size(budget.size(value))
    return budget.new(str(budget.new(value)))


def raise_exception(message: str) -> None:
    """Refuse the conversation; templates call this, for example for a role that they do not know."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """Return the current time in a format; many templates tell the model the date."""
    if len(form) > 1_000:
        raise ValueError("the format of strftime_now has more than 1,000 characters")
    return datetime.now().strftime(form)


# Checks before an operator runs: nothing can interrupt Python while it computes 9 ** 9 ** 9.


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, str | list | tuple):
            budget.check_size(budget.size(value) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        budget.check_bits(left.bit_length() + right.bit_length())


def _check_power(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        budget.check_bits(left.bit_length() * abs(right))


def _check_printf(budget: Budget, left: Any, right: Any) -> None:
    if not isinstance(left, str):
        return
    each = budget.size(right) + _LONGEST_NUMBER
    if "*" in left:
        numbers = [abs(number) for number in (right if isinstance(right, tuple) else ()) if isinstance(number, int)]
        each += 2 * max(numbers, default=0)
    budget.check_size(len(left) + _sum_widths(left) + left.count("%") * each)


CHECKED_OPERATORS = {"*": _check_product, "**": _check_power, "%": _check_printf}


def check_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check a method's cost and return the arguments to call it with; raises SecurityError if it is not allowed."""
    if isinstance(owner, str):
        return _check_text_method(budget, owner, name, args)
    if isinstance(owner, LoopContext | Cycler):
        return args
    if owner is dict and name == "fromkeys":
        return tuple(map(budget.read, args))
    if not any(isinstance(owner, kind) and name in names for kind, names in _METHODS.items()):
        raise SecurityError(f"{type(owner).__name__}.{name} is not among the methods that a template may call")
    if name in ("copy", "count", "index"):
        budget.read(owner)
    return args


def _check_text_method(budget: Budget, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    budget.read(text)
    if name in _TEXT_METHODS:
        for sought in args:
            budget.check_search(text, sought)
    elif name == "join":
        parts: list[Any] = list(*args)
        budget.check_size(sum(budget.size(part) for part in parts) + len(text) * len(parts))
        return (parts,)
    elif name == "replace":
        _check_replace(budget, text, *args[:2])
    elif name in _PADDINGS and isinstance(args[0], int):
        budget.check_size(args[0])
    elif name == "expandtabs":
        budget.check_size(len(text) + text.count("\t") * max((8, *args)))
    else:
        raise SecurityError(f"str.{name} is not among the methods that a template may call")
    return args


def _check_replace(budget: Budget, text: str, old: str, new: str) -> None:
    budget.check_search(text, old)
    budget.check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


# Checks before a filter runs.  Each takes the filter's own arguments and returns those to call the filter with.


def _center(budget: Budget, value: Any, width: int = 80) -> tuple[Any, ...]:
    budget.check_size(width)
    return value, width


def _indent(budget: Budget, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    lines = len(value.splitlines()) + 1 if isinstance(value, str) else 0
    budget.check_size(budget.size(value) + lines * (len(width) if isinstance(width, str) else width))
    return value, width, first, blank


def _replace(budget: Budget, value: Any, old: Any, new: Any, count: int | None = None) -> tuple[Any, ...]:
    texts = [str(part) for part in (value, old, new)]
    _check_replace(budget, *texts)
    return value, old, new, count


def _join(budget: Budget, value: Any, d: Any = "", attribute: str | int | None = None) -> tuple[Any, ...]:
    parts = list(value)
    budget.check_size(sum(map(budget.size, parts)) + (budget.size(d) + _LONGEST_NUMBER) * len(parts))
    return parts, d, attribute


def _format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    _check_printf(budget, str(value), args or kwargs)
    return (value, *args)


def _round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> tuple[Any, ...]:
    _check_power(budget, 10, precision)
    return value, precision, method


def _batch(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> tuple[Any, ...]:
    budget.check_size(linecount)
    return value, linecount, fill_with


def _trim(budget: Budget, value: Any, chars: str | None = None) -> tuple[Any, ...]:
    budget.check_search(str(value), chars)
    return value, chars


_CHECKED_FILTERS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "trim": _trim,
}


def _budget_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of jinja2's filters, wrapped so that it counts what it reads and makes."""
    check, cost, is_cheap = _CHECKED_FILTERS.get(name), _COSTLY.get(name, 0), name in _CHEAP
    first = getattr(run, "jinja_pass_arg", None)
    argument = None if first is None else {"eval_context": "eval_ctx"}.get(first.name, first.name)

    @pass_context
    def counted(context: BudgetedContext, *args: Any, **kwargs: Any) -> Any:
        budget = context.budget
        budget.step()
        if not is_cheap:
            for value in (*args, *kwargs.values()):
                budget.read(value)
        if cost and isinstance(args[0], Sized):
            budget.step(int(len(args[0]) * cost))
        if check is not None:
            args = check(budget, *args, **kwargs)
            kwargs = kwargs if name == "format" else {}
        if argument is not None:
            args = (context if argument == "context" else getattr(context, argument), *args)
        result = run(*args, **kwargs)
        return _count_items(budget, result) if isinstance(result, types.GeneratorType) else budget.new(result)

    return counted


def _count_items(budget: Budget, items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        budget.step()
        yield item


def _budget_test(run: Any) -> Callable[..., Any]:
    """Return one of jinja2's tests, wrapped so that it counts what it reads."""

    @pass_context
    def counted(context: BudgetedContext, *args: Any) -> Any:
        return run(*map(context.budget.read, args))

    return counted


@pass_context
def _tojson(
    context: BudgetedContext,
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON with transformers' options; jinja2's own `tojson` escapes for HTML."""
    budget = context.budget
    size, depth = budget.measure(x)
    each = sum(map(len, separators or ())) + depth * (len(indent) if isinstance(indent, str) else indent or 0)
    budget.check_size(size * (1 + each))
    return budget.new(
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


def filters() -> dict[str, Callable[..., Any]]:
    """Return all filters by name."""
    return {name: _budget_filter(name, FILTERS[name]) for name in FILTERS.keys() - _LEFT_OUT} | {"tojson": _tojson}


def tests() -> dict[str, Callable[..., Any]]:
    """Return the tests that read all of a value, by name; jinja2's others cost nothing."""
    return {name: _budget_test(TESTS[name]) for name in _EQUALITY_TESTS | _ORDER_TESTS}
