"""Renders templates that ask for too much, each in bounded time and memory; a line of JSON for each.

Run with a limit of memory by `test_hostile_templates.py`, so that no case can harm the machine.
"""

import itertools
import json
import resource
import time
from collections.abc import Iterator

from dbrx_fn.errors import DbrxError
from dbrx_fn.text.chat import ChatFormat, render_chat

LONG = "('a' * 4000000)"

# Values that would be too large, or take too long to make.
VALUES = (
    "'a' * 10**10",
    "10**10 * 'a'",
    "[0] * 10**9",
    "(1,) * 10**9",
    "10**(10**8)",
    "10**(10**8) % 7",
    "(2**60) ** (2**60)",
    "7 * 10**300 // 3",
    "'%1000000000d' % 1",
    "'%*d' % (10**9, 1)",
    "'%.1000000000f' % 1",
    "('%s' * 1000) % ((" + LONG + ",) * 1000)",
    "'{:>1000000000}'.format(1)",
    "'{:{w}}'.format(1, w=10**9)",
    "'{0:.{p}f}'.format(1.5, p=10**9)",
    "('{0}' * 100000).format(" + LONG + ")",
    "'x'.center(10**9)",
    "'x'.ljust(10**9)",
    "'x'.zfill(10**9)",
    "'\\t'.expandtabs(10**9)",
    "'x' | center(10**9)",
    "'a\\nb' | indent(10**9)",
    "('\\n' * 1000000) | indent(1000, first=true, blank=true)",
    LONG + " | replace('a', 'b' * 1000000)",
    LONG + ".replace('', 'b' * 1000000)",
    "([" + LONG + "] * 10000) | join(" + LONG + ")",
    "'abc'.join([" + LONG + "] * 100000)",
    LONG + ".join('a' * 1000000)",
    "[1, [2]] | tojson(indent=10**9)",
    "[[[[1]]]] | tojson(separators=(',' * 1000000, ':'))",
    "1.5 | round(10**9, 'ceil')",
    "([[1] * 1000] * 10000) | sum(start=[])",
    "range(10**9) | list",
    "range(0, 2**61 * 90000, 2**61 - 1) | unique | list",
    "lipsum(10**7)",
    "'x' | batch(10**9, 'y') | list",
    "'x' | slice(10**9) | list",
    "'x' | wordwrap(1)",
    LONG + " | urlize",
    LONG + " | pprint",
    LONG + ".rfind('b' + 'a' * 2000000)",
    "('b' + 'a' * 2000000) in " + LONG,
    LONG + ".strip('b' * 1000000 + 'a')",
    LONG + " | trim('b' * 1000000 + 'a')",
    "(1).to_bytes(10**10, 'big')",
    "'a'.encode()",
    "dict(range(99999) | map('list'))",
    "namespace(_x=1)",
    "''.__class__.__mro__",
    "messages.__init__.__globals__",
    "cycler.__init__.__globals__",
    "strftime_now('%Y' * 1000000)",
    "strftime_now('%1000000000d')",
    "raise_exception('\\x1b[31m' * 1000000)",
)
PLACES = (
    "{{ %s }}",
    "{%% set x = %s %%}{{ x | string | length }}",
    "{%% macro m() %%}{{ %s }}{%% endmacro %%}{{ m() }}",
    "{%% for i in range(99999) %%}{%% set x = %s %%}{%% endfor %%}",
    "{%% if (%s) == messages %%}x{%% endif %%}",
)
# Each round doubles a value, or nests it once more.
GROW = (
    "{%% set n = namespace(x=%s, y=%s) %%}"
    "{%% for i in range(2000) %%}{%% set n.x = %s %%}{%% set n.y = %s %%}{%% endfor %%}{{ %s }}"
)
SEEDS = (
    ("'a'", "n.%s + n.%s"),
    ("'a'", "n.%s ~ n.%s"),
    ("[1]", "[n.%s, n.%s]"),
    ("(1,)", "(n.%s, n.%s)"),
    ("{}", "{1: n.%s, 2: n.%s}"),
)
USES = (
    "n.x",
    "n.x == n.y",
    "n.x is eq n.y",
    "n.x in [n.y]",
    "n.x | tojson",
    "n.x | string | length",
    "[n.x, n.y] | sort",
    "{n.x: 1}",
)
DEEP = ("[n.%s]", "(n.%s,)", "{1: n.%s}", "{2: (n.%s,)}")
# FOR stands for a loop of 99999 rounds.
LOOPS = (
    "FORFORFORENDENDEND",
    "FORFOR{% continue %}ENDEND",
    "FOR{% for j in range(99999) if false %}ENDEND",
    "FORFOR{{ loop.changed(i) }}ENDEND",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}END",
    "{% for i in range(99999) recursive %}{{ loop([i]) }}END",
    "FOR{{ range(99999) | list | length }}END",
    "FOR{{ range(99999) | map('string') | join | length }}END",
    "FOR{{ range(99999) | sort | first }}END",
    "FOR{{ i in range(99999) }}END",
    "FOR{{ messages | tojson }}{{ messages }}END",
    "FOR" + "x" * 50000 + "END",
    "{% macro m() %}FOR" + "x" * 50000 + "END{% endmacro %}{{ m() | length }}",
    "{% set x %}FOR" + "x" * 50000 + "END{% endset %}{{ x | length }}",
    "{% macro m() %}" + "x" * 50000 + "{% endmacro %}FOR{{ m() }}END",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(60) }}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call m() %}FORxEND{% endcall %}",
    "{% macro m() %}{{ varargs | length }}{% endmacro %}FOR{{ m(*range(99999)) }}END",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% set n = namespace(x=[1]) %}FOR{% set n.x = n.x | map('string') %}END{{ n.x | list }}",
    "{% set n = namespace() %}{% set n.x = n %}{{ n }}{{ n.x == [n] }}",
    "{% set s %}FOR{{ i * (2**61 - 1) }} END{% endset %}{{ s.split() | map('int') | unique | list }}",
    "{% set a = 'ab ' * 1300000 %}FOR{{ a | title | length }}{{ a.split() | length }}END",
    "{% set a = 'a' * 2400 %}{% set b = 'a' * 600 + 'b' + 'a' * 600 %}FOR{{ a.find(b) }}{{ b in a }}END",
    "{% set a = 'a' * 1000000 %}FOR{% if a[1:] == a[:-1] %}{% endif %}END",
    "{% set a = 'a' * 1000000 %}FOR{{ a | upper | lower | trim | escape | length }}END",
    "{% filter upper %}FORFORxENDEND{% endfilter %}",
    "{% autoescape true %}FOR{{ '<' * 100000 }}END{% endautoescape %}",
)
SOURCES = (
    "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "{{ " + "[" * 30000 + "1" + "]" * 30000 + " }}",
    "{{ " + "{1:" * 15000 + "1" + "}" * 15000 + " }}",
    "{{ " + "-" * 60000 + "1 }}",
    "{{ " + "not " * 15000 + "1 }}",
    "{{ " + "1+" * 30000 + "1 }}",
    "{{ " + "a~" * 30000 + "1 }}",
    "{{ " + "a." * 30000 + "a }}",
    "{{ " + "a if a else " * 5000 + "a }}",
    "{{ " + "a and " * 10000 + "a }}",
    "{{ " + "1 < " * 15000 + "1 }}",
    "{{ a" + "|trim" * 12000 + " }}",
    "{{ a" + "[0]" * 20000 + " }}",
    "{{ f" + "()" * 30000 + " }}",
    "{{a}}" * 13000,
    "{% set a = 1 %}" * 4000,
    "{% macro m() %}{% endmacro %}" * 2000,
    "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "{% for x in y %}" * 2000 + "{% endfor %}" * 2000,
    "{%" * 30000,
    "{{" * 30000,
    "{#" * 30000,
    "{% raw %}" * 7000,
    '{{ "' + "a" * 60000,
    "{{ '" + "\\\\" * 30000 + "' }}",
    "{{ 1" + "0" * 60000 + " }}",
    "{{ 0x" + "f" * 60000 + " }}",
    "{{ 1e" + "9" * 10000 + " }}",
    "{{ a[1" + ":" * 1000 + "] }}",
    "{{ a in b in c }}",
    "{% include 'x' %}",
    "{% extends messages %}",
    "{% import '/etc/passwd' as x %}",
    "x" * 70000,
    "{% unknown %}",
    "\x00\x1b[31m{{ \x1b }}",
    "{{ raise_exception('\x1b]0;title\x07 \x9b31m \u202e') }}",
    "{{ raise_exception('a' * 4000000) }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception() }}",
    "{% generation %}{% generation %}{{ 1 / 0 }}{% endgeneration %}{% endgeneration %}",
)


def cases() -> Iterator[str]:
    """All templates."""
    for place, value in itertools.product(PLACES, VALUES):
        yield place % value
    for (seed, grown), use in itertools.product(SEEDS, USES):
        yield GROW % (seed, seed, grown % ("x", "x"), grown % ("y", "y"), use)
    for grown, use in itertools.product(DEEP, USES):
        yield GROW % ("1", "1", grown % "x", grown % "y", use)
    for template in LOOPS:
        yield template.replace("FOR", "{% for i in range(99999) %}").replace("END", "{% endfor %}")
    yield from SOURCES


def main() -> None:
    """Renders all, and prints what each has come to."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for number, template in enumerate(cases()):
        start = time.process_time()
        try:
            text = render_chat(messages, ChatFormat(template, source=f"case {number}"))
            result = "rendered", str(len(text))
        except DbrxError as error:
            result = "refused", str(error)
        except BaseException as error:
            result = "failed", repr(error)[:300]
        spent = time.process_time() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([number, *result, round(spent, 3), memory]), flush=True)


if __name__ == "__main__":
    main()
