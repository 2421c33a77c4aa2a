"""Runs a chat template, which is untrusted code, within bounds on work and memory.

Jinja's sandbox keeps a template from reaching the machine, but not from running forever. Here each operation is charged
before it runs (`template_meter`), and operations that can't be charged aren't available. Jinja's sandbox has methods to
override for operators, calls and attributes. Other charges are inserted into the template's syntax tree.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Namespace

from dbrx_fn.text.template_charging import COUNTED, GO_OVER, READ, SPEND, Charging
from dbrx_fn.text.template_meter import (
    CALL,
    FILTER_CHARGES,
    ITEM,
    METHOD_CHARGES,
    NODE,
    SHALLOW_FILTERS,
    STEP,
    Charge,
    Meter,
    TemplateBoundsError,
    charge_format,
    charge_join,
    charge_power,
    charge_repeat,
    checked_length,
    is_iterator,
    words,
)

LONGEST_TEMPLATE = 2**16
"""The most characters of a template. The longest in use have 20 thousand."""

# The available attributes of values.
_TEXT_METHODS = words(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_LOOP_NAMES = words("changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0")
_ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _TEXT_METHODS),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    (list, frozenset(("copy", "count", "index"))),
    (tuple, frozenset(("count", "grouper", "index", "list"))),
    (LoopContext, _LOOP_NAMES),
    (Macro, frozenset(("arguments", "caller", "catch_kwargs", "catch_varargs", "name"))),
    (BlockReference, frozenset(("super",))),
    (Cycler, frozenset(("current", "next", "reset"))),
)
# Their time or result grows too fast, or they are random. No chat template in use needs them.
_FILTERS_LEFT_OUT = words(
    "attr batch center filesizeformat forceescape pprint random slice striptags truncate urlencode urlize wordcount "
    "wordwrap xmlattr"
)
_COMPARING_TESTS = words("!= < <= == > >= eq equalto ge greaterthan gt le lessthan lt ne lower upper")


@dataclass(frozen=True)
class Program:
    """A compiled template.

    Attributes:
        code: Jinja's compiled code.
        variables: names that it reads without setting them, such as `messages` and `tools`.
        names: all attributes, keys and other constant texts in it.
    """

    code: CodeType
    variables: frozenset[str]
    names: frozenset[str]


@lru_cache(maxsize=16)
def compile_template(source: str) -> Program:
    """Compiles a template.

    Raises:
        TemplateBoundsError: if it is too long.
        Exception: any error of Jinja and Python for a text that isn't a template or is nested too deeply.
    """
    if len(source) > LONGEST_TEMPLATE:
        raise TemplateBoundsError(f"it has {len(source)} characters, more than the {LONGEST_TEMPLATE} that are read")
    tree = _ENVIRONMENT.parse(source)
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names = frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)})
    variables = frozenset(meta.find_undeclared_variables(tree))
    return Program(_ENVIRONMENT.compile(Charging().visit(tree)), variables, names)


def render(program: Program, variables: Mapping[str, object], now: datetime) -> str:
    """Renders a compiled template.

    Args:
        program: from `compile_template`.
        variables: values of JSON's types only, whose methods are known; whole numbers of 64 bits at most.
        now: the time that `strftime_now` shows.

    Raises:
        TemplateBoundsError: if it needs too much work or memory.
        Exception: any other error of the template.
    """
    environment = copy.copy(_ENVIRONMENT)
    environment.meter = Meter()

    def strftime_now(form: str) -> str:
        if len(form) > 100:
            raise TemplateBoundsError("the form of its date has more than 100 characters")
        return now.strftime(form)

    names = environment.make_globals({"strftime_now": strftime_now})
    return jinja2.Template.from_code(environment, program.code, names).render(variables)


class _GenerationBlocks(Extension):
    """Accepts transformers' `{% generation %}` blocks, which mark the assistant's text, and renders their content."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_block"), [], [], body).set_lineno(line)

    def render_block(self, caller: Macro) -> str:
        """Renders a block's content."""
        return caller()


class _Namespace(Namespace):
    """A namespace that refuses names with a leading underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            _Namespace.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace can't have the attribute {name!r}")
        Namespace.__setitem__(self, name, value)


class _Formatter(SandboxedFormatter):
    """Fills in the fields of `str.format`, and charges for each."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        found = super().get_field(field_name, args, kwargs)
        cast(_Environment, self._env).meter.read(found[0])
        return found

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{4}", format_spec):
            raise TemplateBoundsError("it formats in a width of thousands")
        return super().format_field(value, format_spec)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a meter. Each rendering uses a copy with its own meter."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, loopcontrols],
            # Otherwise constants would be computed at compile time, without a charge.
            optimized=False,
            finalize=_put_out,
        )
        self.meter = Meter()
        for name in _FILTERS_LEFT_OUT:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _metered(function, name not in SHALLOW_FILTERS, FILTER_CHARGES.get(name))
        self.filters |= {SPEND: _spend, READ: _read, GO_OVER: _go_over, COUNTED: _counted}
        for name in _COMPARING_TESTS:
            self.tests[name] = _metered(self.tests[name], True, None)
        self.tests["in"] = _is_in
        self.globals |= {"raise_exception": _raise_exception, "dict": _dict, "range": _range, "namespace": _Namespace}
        del self.globals["lipsum"]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether an attribute is available."""
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _ATTRIBUTES)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscripts a value. Charges for hashing the key."""
        self.meter.spend(NODE)
        if type(argument) is not str and type(argument) is not int:
            self.meter.read(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A metered replacement of `str.format`."""
        if not isinstance(value, BuiltinMethodType | MethodType) or value.__name__ not in ("format", "format_map"):
            return None
        form = value.__self__
        if not isinstance(form, str):
            return None
        if type(form) is not str or value.__name__ != "format":
            raise SecurityError("it formats in a way that isn't offered")

        def formatted(*args: Any, **kwargs: Any) -> str:
            self.meter.spend(STEP * checked_length(len(form)))
            return _Formatter(self).vformat(form, args, kwargs)

        return formatted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies a binary operator."""
        meter = self.meter
        meter.spend(NODE)
        if operator == "+":
            meter.go_over(left)
            meter.go_over(right)
        elif operator == "%":
            charge_format(meter, left, right)
        elif operator == "*":
            charge_repeat(meter, left, right)
            charge_repeat(meter, right, left)
        elif operator == "**":
            charge_power(meter, left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, macro or method."""
        meter = self.meter
        meter.spend(CALL)
        meter.go_over(args)
        if not isinstance(function, Macro):
            named = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            own = getattr(function, "__self__", None) if isinstance(function, BuiltinMethodType | MethodType) else None
            if isinstance(own, str | list | tuple):
                args = tuple(list(value) if is_iterator(value) else value for value in args)
                meter.read(own)
            meter.read(args, named)
            if isinstance(own, str) and function.__name__ == "join":
                charge_join(meter, *args, own)
            elif isinstance(own, str) and function.__name__ in METHOD_CHARGES:
                METHOD_CHARGES[function.__name__](meter, own, *args, **named)
        return meter.made(super().call(context, function, *args, **kwargs))


def _meter(context: Context) -> Meter:
    return cast(_Environment, context.environment).meter


def _metered(function: Any, whole: bool, charge: Charge | None) -> Callable[..., Any]:
    """A filter or test that charges for the values that it reads and makes."""
    passed = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function)
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend(CALL)
        if whole:
            value = list(value) if is_iterator(value) else value
            meter.read(value)
        else:
            meter.go_over(value)
        meter.read(args, kwargs)
        if charge is not None:
            charge(meter, value, *args, **kwargs)
        if passed is None:
            return meter.made(function(value, *args, **kwargs))
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passed.name]
        return meter.made(function(first, value, *args, **kwargs))

    return metered


@pass_context
def _is_in(context: Context, value: Any, values: Any) -> bool:
    meter = _meter(context)
    if isinstance(values, dict):
        meter.read(value)
    else:
        values = list(values) if is_iterator(values) else values
        meter.read(value, values)
        meter.search(values, value)
    return value in values


@pass_context
def _put_out(context: Context, value: Any) -> Any:
    if type(value) is str:
        _meter(context).spend(ITEM + len(value))
    else:
        _meter(context).read(value)
    return value


@pass_context
def _spend(context: Context, work: int) -> None:
    _meter(context).spend(work)


@pass_context
def _read(context: Context, value: Any) -> Any:
    _meter(context).read(value)
    return value


@pass_context
def _go_over(context: Context, value: Any) -> Any:
    _meter(context).go_over(value)
    return value


@pass_context
def _counted(context: Context, values: Any) -> Iterator[Any]:
    return _meter(context).counted(values)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _range(*bounds: int) -> range:
    if any(abs(bound) > 2**31 for bound in bounds):
        raise TemplateBoundsError("it goes over numbers of more than 31 bits")
    return safe_range(*bounds)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = _Environment()
