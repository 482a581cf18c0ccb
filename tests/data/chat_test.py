"""Templates cut at their contents: what is found out, what is refused."""

import jinja2
import pytest

from sera_jax.data import chat
from sera_jax.data.escaping import PromptRefused


def cut(source: str) -> chat.ChatTemplate:
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def render(text, messages, generation):
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(text, globals={"raise_exception": raise_exception})
        return template.render(messages=messages, add_generation_prompt=generation)

    return chat.ChatTemplate(source, render)


def each(body: str, generation: str = "") -> str:
    return "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}" + generation + "{% endif %}"


USER = [{"role": "user", "content": " Hi "}]


def test_the_pieces_and_contents_make_the_rendering():
    template = cut(each("<{{ m.role }}>{{ m.content }}\n", "<assistant>"))
    shape, contents = template.contents(USER)
    assert chat.interleave(shape.prompt, contents) == "<user> Hi \n<assistant>"
    assert (shape.lead, shape.after) == ("", "\n")
    shape, contents = template.contents(USER, "Yes")
    assert chat.interleave(shape.full, contents) == "<user> Hi \n<assistant>Yes\n"


def test_a_template_that_strips_contents_has_them_stripped():
    shape, contents = cut(each("<{{ m.role }}> {{ m.content | trim }}\n", "<assistant>")).contents(USER, " Yes ")
    assert contents == ["Hi", "Yes"]
    assert shape.lead == " "


def test_without_a_generation_prompt_what_stands_before_an_answer_is_the_prompts():
    shape, contents = cut(each("<{{ m.role }}>: {{ m.content }}\n")).contents(USER)
    assert chat.interleave(shape.prompt, contents) == "<user>:  Hi \n<assistant>:"
    assert shape.lead == " "


def test_a_generation_prompt_that_answers_do_not_repeat_is_still_what_generation_is_given():
    shape, _ = cut(each("<{{ m.role }}>{{ m.content }}\n", "<assistant><think>")).contents(USER)
    assert shape.prompt[-1] == "\n<assistant><think>"
    assert not shape.opens
    assert (shape.lead, shape.after) == ("", "\n")


LATE = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[I]{{ (s + '\\n\\n' if loop.last and s else '') + m.content }}[/I]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_template_that_puts_the_system_message_late_gives_the_prompt_that_generation_is_given():
    said = [dict(role=role, content=text) for role, text in [("system", "S"), ("user", "A"), ("assistant", "B")]]
    said.append({"role": "user", "content": "C"})
    template = cut(LATE)
    shape, contents = template.contents(said)
    assert chat.interleave(shape.prompt, contents) == "[I]A[/I] B</s>[I]S\n\nC[/I]"
    shape, contents = template.contents(said, "D")
    assert (contents[-1], shape.lead, shape.after, shape.opens) == ("D", " ", "</s>", True)


def test_a_template_that_takes_thoughts_out_of_earlier_answers_gives_what_generation_is_given():
    template = cut(each("<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\n", "<assistant>"))
    said = [*USER, {"role": "assistant", "content": "<think>x</think>Yes"}, {"role": "user", "content": "And?"}]
    shape, contents = template.contents(said)
    assert chat.interleave(shape.prompt, contents) == "<user> Hi \n<assistant>Yes\n<user>And?\n<assistant>"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{{ m.role }}", "leaves out or changes"),
        ("{{ m.content | upper }}", "leaves out or changes"),
        ("{{ m.content }}{{ m.content }}", "repeats"),
        ("{{ messages[(loop.index0 + 1) % messages | length].content }}", "reorders"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ m.content + missing }}", "missing"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused_with_the_reason(body, reason):
    with pytest.raises(PromptRefused, match=reason):
        cut(each(body)).contents(USER)


def test_a_conversation_that_the_template_rewrites_is_refused_and_others_are_not():
    template = cut(each("{% if 'secret' in m.content %}hidden{% else %}{{ m.content }}{% endif %}\n"))
    assert template.contents(USER)[1] == [" Hi "]
    with pytest.raises(PromptRefused, match="rewrites"):
        template.contents([{"role": "user", "content": "a secret"}])
    with pytest.raises(PromptRefused, match="rewrites"):
        template.contents(USER, "a secret")


def test_a_template_that_prints_the_date_prints_the_same_one_every_day():
    shape, _ = cut("{{ strftime_now('%d %B %Y') }}" + each("{{ m.content }}")).contents(USER)
    assert shape.prompt[0] == "26 July 2024"


def test_content_that_is_not_text_is_refused():
    with pytest.raises(PromptRefused, match="not text"):
        cut(each("{{ m.content }}")).contents([{"role": "user", "content": [{"type": "text"}]}])  # pyright: ignore


def test_a_template_is_named_pathed_or_written_out(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages }}")
    assert chat.resolve("", "own") == chat.resolve(None, "own") == "own"
    assert chat.resolve("", None) is None
    assert chat.resolve("none", "own") is None
    assert chat.resolve("hh", "own") == chat.HH
    assert chat.resolve(str(path), "own") == chat.resolve("{{ messages }}", None) == "{{ messages }}"
    with pytest.raises(ValueError, match="'hh'"):
        chat.resolve("chatml", "own")


def test_the_hh_transcript_takes_a_system_text_first_and_refuses_it_elsewhere():
    template = cut(chat.HH)
    system = {"role": "system", "content": "Be kind."}
    shape, contents = template.contents([system, {"role": "user", "content": "Hi"}])
    assert chat.interleave(shape.prompt, contents) == "Be kind.\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(PromptRefused, match="system"):
        template.contents([{"role": "user", "content": "Hi"}, system])


def test_a_template_that_is_not_done_in_time_is_refused_when_it_is_first_asked(monkeypatch):
    monkeypatch.setattr(chat, "PROBE_SECONDS", 0.05)
    endless = "{% for i in range(2000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    with pytest.raises(PromptRefused, match=r"not done with a short conversation after 0\.05 seconds"):
        cut(endless + each("{{ m.content }}")).shape(("user",))
    assert cut(each("{{ m.content }}")).shape(("user",)).prompt == ("", "")
