"""Templates from strangers: whatever they compute, they end soon, and the error names the limit that they met."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from lowvram.errors import LowvramError, PromptError, TokenizerError
from lowvram.generate import template_budget
from lowvram.generate.chat_template import ChatTemplate, Message
from lowvram.generate.template_budget import (
    MOST_CHARACTERS,
    MOST_INTEGER_BITS,
    MOST_LEVELS,
    MOST_OF_ONE_VALUE,
    MOST_SOURCE_CHARACTERS,
    MOST_STEPS,
    Budget,
    BudgetError,
)

STEPS, TEXT, VALUE = "more than 100,200 steps", "more than 4,196,352 characters", "a value of more than 1,048,576"
BITS, LEVELS = "an integer of more than 1,024 bits", "deeper than 100 levels"
# A loop that changes ns.x again and again.
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(999) %%}{%% set ns.x = %s %%}{%% endfor %%}"
BIG = "{% set h = 'a' * 1000000 %}"

HOSTILE = {
    # Numbers.
    "{{ 9 ** (9 ** 9) }}": BITS,
    "{{ 7 ** 100000000 }}": BITS,
    GROW % ("9", "ns.x * ns.x"): BITS,
    "{{ 1 | round(1000000000, 'ceil') }}": BITS,
    BIG + "{{ ('f' * 1000000) | int(0, 16) }}": BITS,
    "{{ (1).to_bytes(1000000000, 'big') }}": "int.to_bytes is not among",
    # Loops.
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": STEPS,
    "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}": STEPS,
    "{% for a in [1] | slice(1000000000) %}{% endfor %}": STEPS,
    "{% for a in range(999) %}{% set x = range(99999) | select('string') | first %}{% endfor %}": STEPS,
    "{% for a in range(999) %}{{ loop.cycle(*range(99999)) }}{% endfor %}": "more than",
    "{% for a in range(10000000) %}x{% endfor %}": "OverflowError",
    # Macros and blocks.
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}": STEPS,
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}": "RecursionError",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}": "RecursionError",
    # Texts and lists that grow at once.
    "{{ 'a' * 10 ** 8 }}": VALUE,
    "{{ 10 ** 8 * 'a' }}": VALUE,
    "{{ [0] * 10 ** 9 }}": VALUE,
    "{{ ([0] * 1000) * 10000 }}": VALUE,
    "{{ 'a' | center(1000000000) }}{{ 'a'.center(1000000000) }}": VALUE,
    "{{ 'a'.ljust(1000000000) }}": VALUE,
    "{{ 'a'.zfill(1000000000) }}": VALUE,
    "{{ '\t'.expandtabs(1000000000) }}": VALUE,
    "{{ ('a\n' * 1000) | indent(1000000000) }}": VALUE,
    "{{ ('a\n' * 9999) | indent('x' * 9999) }}": VALUE,
    "{{ '%99999999d' % 1 }}": VALUE,
    "{{ '%.99999999f' % 1.0 }}": VALUE,
    "{{ '%*d' % (99999999, 1) }}": VALUE,
    "{{ '%(a(b))99999999d' % {'a(b)': 1} }}": VALUE,
    "{{ '%99999999d' | format(1) }}": VALUE,
    "{{ '{:99999999d}'.format(1) }}": VALUE,
    "{{ '{:{}}'.format(1, 99999999) }}": VALUE,
    "{{ '{a:99999999}'.format_map({'a': 1}) }}": VALUE,
    "{{ ('{}' | safe).format(1).join(['<'] * 999999 * 9) }}": VALUE,
    "{{ ('a' * 9999) | join('b' * 9999) }}": VALUE,
    "{{ ('b' * 9999).join('a' * 9999) }}": VALUE,
    "{{ range(99999) | join('b' * 99) }}": VALUE,
    "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}": VALUE,
    "{{ ('a' * 9999).replace('', 'b' * 9999) }}": VALUE,
    "{{ [1] | batch(1000000000, 'x') | list }}": VALUE,
    "{{ [[1]] | tojson(indent=1000000000) }}": VALUE,
    BIG + "{{ h ~ h }}": VALUE,
    # Texts and lists that grow by and by.
    GROW % ("'a'", "ns.x ~ ns.x"): VALUE,
    GROW % ("'a'", "ns.x + ns.x"): "more than",
    GROW % ("['a']", "ns.x + ns.x"): "more than",
    GROW % ("''", "ns.x ~ 'abcdefghijklmnopqrst' * 20"): TEXT,
    BIG + "{{ h }}" * 9: TEXT,
    BIG + "{% macro m() %}" + "{{ h }}" * 9 + "{% endmacro %}{{ m() | length }}": TEXT,
    "{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}": TEXT,
    "{% for a in range(99999) %}{% set x %}" + "x" * 999 + "{% endset %}{% endfor %}": TEXT,
    "{{ range(99999) | map('center', 10000) | list }}": TEXT,
    # Lists that share their elements: few bytes, which print as gigabytes.
    GROW % ("['a']", "[ns.x, ns.x]") + "{{ ns.x }}": VALUE,
    GROW % ("('a',)", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}": VALUE,
    GROW % ("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}": VALUE,
    GROW % ("{}", "{'a': ns.x, 'b': ns.x}.items()") + "{{ ns.x }}": VALUE,
    GROW % ("('a',)", "(ns.x,)") + "{{ {ns.x: 1} }}": LEVELS,
    # Work that makes nothing.
    BIG + "{% for i in range(99999) %}{% if 'b' in h %}{% endif %}{% endfor %}": STEPS,
    BIG + "{% set g = h[1:] ~ 'a' %}{% for i in range(99999) %}{% if g == h %}{% endif %}{% endfor %}": STEPS,
    BIG + "{% set g = h[1:] ~ 'a' %}{% for i in range(99999) %}{% if g is eq h %}{% endif %}{% endfor %}": STEPS,
    BIG + "{% for i in range(99999) %}{% if h.count('ab') %}{% endif %}{% endfor %}": STEPS,
    BIG + "{% for i in range(99999) %}{% set x = h[1:] %}{% endfor %}": TEXT,
    "{% set t = range(99999) | list %}{% for i in range(99999) %}{% set x = t | sort %}{% endfor %}": "more than",
    BIG + "{{ h.rfind('b' ~ 'a' * 500000) }}": "looks for a text of 500,001 characters in one of 1,000,000",
    BIG + "{{ h.strip('b' * 500000 ~ 'a') }}": "looks for a text of 500,001 characters in one of 1,000,000",
    BIG + "{{ h | trim('b' * 500000 ~ 'a') }}": "looks for a text of 500,001 characters in one of 1,000,000",
    # What no template needs.
    "{{ 'a'.encode() }}": "str.encode is not among the methods",
    "{{ 'aaaa'.translate({97: 'b' * 1000000}) }}": "str.translate is not among",
    "{{ lipsum(1000000) }}": "'lipsum' is undefined",
    "{{ strftime_now('%c' * 1000) }}": "more than 1,000 characters",
    "{% include 'x' %}": "no loader",
}


def render(source: str) -> str:
    return ChatTemplate(source + "{{ messages[0].content }}", {}).render([Message("user", "evet")]).removesuffix("evet")


@pytest.mark.parametrize("source, said", HOSTILE.items(), ids=[f"{n}" for n in range(len(HOSTILE))])
def test_a_template_that_would_never_end_or_fill_the_memory_is_refused(
    source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_budget, "MOST_STEPS", 100_000)  # a tenth, to be quick
    with pytest.raises(PromptError, match=said) as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{% for a in [1] %}" * 300 + "{% endfor %}" * 300,
        "{% if a %}" + "{% elif a %}" * 5000 + "{% endif %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ " + "not " * 5000 + "a }}",
        "{{ " + "+".join(["a"] * 9000) + " }}",
        "{{ " + "9" * 60000 + " }}",
        "{{ 0x" + "f" * 60000 + " }}",
        "{{ 'a' | wordwrap(1) }}",
        "{{ ''" + "\\" * 60000,
        "{#" * 30000,
        "x" * (MOST_SOURCE_CHARACTERS + 1),
        "x" * 100 * MOST_SOURCE_CHARACTERS,
    ],
    ids=range(14),
)
def test_a_template_that_cannot_be_compiled_is_an_error_of_one_paragraph(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template") as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_limits_are_reached_before_they_are_passed() -> None:
    assert len(ChatTemplate("x" * MOST_SOURCE_CHARACTERS, {}).render([Message("user", "")])) == MOST_SOURCE_CHARACTERS
    assert len(render(f"{{{{ 'a' * {MOST_OF_ONE_VALUE} }}}}")) == MOST_OF_ONE_VALUE
    with pytest.raises(PromptError, match=VALUE):
        render(f"{{{{ 'a' * {MOST_OF_ONE_VALUE + 1} }}}}")
    assert render(f"{{{{ 2 ** {MOST_INTEGER_BITS // 2 - 1} > 0 }}}}") == "True"
    with pytest.raises(PromptError, match=BITS):
        render(f"{{{{ 2 ** {MOST_INTEGER_BITS} > 0 }}}}")
    budget, nested = Budget(), list[object]()
    for _ in range(MOST_LEVELS - 1):
        nested = [nested]
    assert budget.measure(nested)[1] == MOST_LEVELS
    with pytest.raises(BudgetError, match=LEVELS):
        budget.measure([nested])


def test_a_budget_counts_to_its_last_step_and_its_last_character() -> None:
    budget = Budget()
    budget.step(MOST_STEPS)
    with pytest.raises(BudgetError, match="1,000,000 steps"):
        budget.step()
    budget = Budget()
    budget.take(MOST_CHARACTERS)
    with pytest.raises(BudgetError, match="4,194,304 characters"):
        budget.take(1)


def test_a_longer_conversation_may_take_more() -> None:
    source = "{% for m in messages %}{{ m.content }}{% for i in range(1500) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {})
    with pytest.raises(PromptError, match="steps"):
        template.render([Message("user", "evet")] * 1000)
    plain = ChatTemplate("{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}", {})
    assert len(plain.render([Message("user", "evet")] * 20_000)) == 20_000 * len("<user>evet</>")


def test_the_clock_of_the_thread_ends_what_the_counts_underrate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(template_budget.time, "thread_time", lambda: next(now))
    with pytest.raises(PromptError, match="more than 10 s of processor time"):
        render("{% for i in range(999) %}{% endfor %}")


def test_what_is_refused_has_taken_little_memory_and_time() -> None:
    tracemalloc.start()
    began_s = time.process_time()
    for source in ("{{ 'a' * 10 ** 8 }}", "{{ '%99999999d' % 1 }}", GROW % ("['a']", "[ns.x, ns.x]") + "{{ ns.x }}"):
        with pytest.raises(LowvramError):
            render(source)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10 << 20
    assert time.process_time() - began_s < 60  # without a budget: hours


@pytest.mark.parametrize(
    "source, text",
    [
        (
            "{{ [1, 'a', {'b': none}] }}{{ (1,) }}{{ {'a': [2.5, true]} }}",
            "[1, 'a', {'b': None}](1,){'a': [2.5, True]}",
        ),
        ("{{ '%05.2f|%s|%(n)d' | format(n=3) if false else '%5s|%-4d|' % ('a', 7) }}", "    a|7   |"),
        ("{{ '{:>5}|{a[0]!r}'.format(12, a=['x']) }}{{ '{k}'.format_map({'k': 'v'}) }}", "   12|'x'v"),
        (
            "{{ ['a', 'b'] | join(', ') }}{{ '-'.join(['a', 'b']) }}{{ messages | join('|', attribute='role') }}",
            "a, ba-buser",
        ),
        ("{{ 'a b'.split() | map('upper') | list }}{{ [3, 1, 2] | sort | first }}", "['A', 'B']1"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [1, 2] | sum }}", "13"),
        ("{% for x in [1, 2, 3] if x is odd %}{{ loop.index }}/{{ loop.length }}:{{ x }} {% endfor %}", "1/2:1 2/2:3 "),
        ("{% macro m(a, b='y') %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m('x') %}z{% endcall %}", "xyz"),
        ("{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x ~ 2 ~ none }}{% filter upper %}b{% endfilter %}", "a12NoneB"),
        (
            "{{ {'a': 'ş'} | tojson }}{{ [1] | tojson(indent=1) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
            '{"a": "ş"}[\n 1\n][1,2]',
        ),
        (
            "{{ 'abc'[1:] }}{{ [1, 2, 3][::-1] }}{{ 'abc'[::-1] }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 1 / 2 }}",
            "bc[3, 2, 1]cba3380.5",
        ),
        (
            "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ messages[0].role in ['user'] }}",
            "TrueTrueTrueTrue",
        ),
        ("{% for x in [[1, [2]]] recursive %}{{ x if x is not iterable else loop(x) }}{% endfor %}", "12"),
        (
            "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a'], 1) }}{{ ' a'.strip() | default('b') }}",
            "{'a': 1, 'b': 2}{'a': 1}a",
        ),
        (
            "{{ 'a\nb' | indent(2) }}{{ 'x' | center(3) }}{{ 'aXa' | replace('X', '') }}{{ 2.567 | round(1) }}",
            "a\n  b x aa2.6",
        ),
        ("{{ undefined }}{{ undefined is defined }}{{ bos_token is defined }}", "FalseFalse"),
    ],
    ids=range(17),
)
def test_what_templates_compute_is_what_jinja_computes_for_transformers(source: str, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    assert render(source) == text
    theirs, _ = render_jinja_template([[{"role": "user", "content": "evet"}]], chat_template=source)
    assert theirs == [text]
