"""A template is taken to copy contents only where it cannot look at them."""

import itertools

import pytest

from sera_jax.data import chat
from sera_jax.data.opaque import copies_contents
from tests.data.chat_test import cut, each

COPIES = [
    chat.HH,
    chat.with_fixed_date("{{ strftime_now('%d %B') }}" + each("{{ m.role }}{{ m.content }}", "assistant")),
    each("<{{ m['role'] }}>\n{{ m['content'] | trim }}</s>", "<assistant>\n"),
    each("{{ '<' + m.role + '>' + m.content.strip() + '</s>' }}", "<assistant>"),
    each("{% set c = m['content'] %}{% if loop.first %}{% set c = 'a' ~ c %}{% endif %}{{ c }}|", ""),
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ s }}#{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "{{ m['content'] }}|{% endfor %}",
    each("{% if m.content is string and 'tool_calls' not in m %}{{ m.content }}{% endif %}|"),
]
LOOKS = [
    each("{% if 'x' in m.content %}x{% endif %}{{ m.content }}"),
    each("{% if m.content %}{{ m.content }}{% endif %}"),
    each("{% set c = m['content'] %}{% if c | length > 3 %}long{% endif %}{{ c }}"),
    each("{{ m.content.split('</think>')[-1] }}"),
    each("{{ m.content | replace('a', 'b') }}"),
    each("{{ m.content | upper }}"),
    each("{{ m.get('content') | upper }}"),
    each("{% if 'x' in m.get('content') %}x{% endif %}{{ m.content }}"),
    each("{% if m['values']() | join == 'x' %}x{% endif %}{{ m.content }}"),
    each("{{ '%s' % m.content }}"),
    each("{% for c in m.content %}{{ c }}{% endfor %}"),
    each("{% set ns = namespace(last='') %}{% set ns.last = m.content %}{{ ns.last }}"),
    each("{% set field = 'content' %}{% if m[field] == 'x' %}x{% endif %}{{ m.content }}"),
    each("{% if (m.content + '') == 'x' %}x{% endif %}{{ m.content }}"),
    each("{% if loop.previtem is defined and loop.previtem.content == 'x' %}x{% endif %}{{ m.content }}"),
    each("{{ t }}{% if t == 'x' %}x{% endif %}{% set t = m.content %}{{ m.content }}"),
    "{{ messages | tojson }}",
    "{% macro of(m) %}{{ m.content | upper }}{% endmacro %}" + each("{{ of(m) }}"),
    "{% macro first() %}{{ messages[0].content }}{% endmacro %}"
    + each("{% if first() == 'x' %}x{% endif %}{{ m.content }}"),
    "{% set c %}{{ messages[0].content }}{% endset %}{{ c | upper }}" + each("{{ m.content }}"),
    "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "{% for m in messages",
]


@pytest.mark.parametrize("source", COPIES)
def test_what_copies_contents_writes_the_same_pieces_around_any(source):
    assert copies_contents(source)
    template = cut(source)
    asked = cut(source)
    asked._copies = False  # renders each conversation and compares
    said = ["a", " Hi <b> \n", "x", "</think>x", "{{ m }}", ""]
    for user, answer, system in itertools.product(said, said, (None, "Be brief.")):
        turns = [{"role": "user", "content": user}]
        turns = turns if system is None else [{"role": "system", "content": system}, *turns]
        for what in (None, answer):
            assert template.contents(turns, what) == asked.contents(turns, what)


@pytest.mark.parametrize("source", LOOKS)
def test_what_may_look_at_a_content_is_rendered_every_time(source):
    assert not copies_contents(source)
