"""Chat templates: what real ones use works, and what a hostile one tries does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.errors import TemplateError, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text
from edge_mmllm.text.template import ChatTemplate

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def _text(template: str | None, **fields: Any) -> Text:
    return Text(TextSpec("none", chat_template=template, **fields))


def _render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render(variables)


# --- what real templates use --------------------------------------------------------------------


def test_a_chatml_conversation() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "<é>"}]
    assert _text(CHATML).apply_chat_template(messages) == (
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\n<é><|im_end|>\n<|im_start|>assistant\n"
    )
    assert not _text(CHATML).apply_chat_template(HELLO, False).endswith("assistant\n")


def test_the_zoos_own_template(shared_data: Path) -> None:
    path = shared_data / "zoo/tiny-llava/chat_template.json"
    if not path.is_file():
        pytest.skip("no tiny-llava/chat_template.json in the shared data")
    text = _text(json.loads(path.read_text("utf-8"))["chat_template"])
    assert text.apply_chat_template(IMAGE) == "USER: <image>\nWhat is it? ASSISTANT:"
    assert text.apply_chat_template(HELLO) == "USER: Hello ASSISTANT:"


def test_blocks_take_their_line_with_them() -> None:
    assert _render("  {% if true %}\nyes\n  {% endif %}\n") == "yes\n"


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("{{ x | tojson }}", '{"b": "<é>\'", "a": 1}'),
        ("{{ x | tojson(indent=2) }}", '{\n  "b": "<é>\'",\n  "a": 1\n}'),
        ("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":1,"b":"<é>\'"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}x{% endfor %}", "xx"),
        ("{% for i in range(5) if i is odd %}{{ i }}/{{ loop.length }} {% endfor %}", "1/2 3/2 "),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in x.items() %}{{ loop.index0 }}{{ i[0] }}{{ loop.last }}{% endfor %}",
         "0bFalse1aTrue"),
        ("{% for n in t recursive %}{{ n.v }}{{ loop(n.c) }}{% endfor %}", "12"),
        ("{% generation %}a{{ 1 + 1 }}{% endgeneration %}", "a2"),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('x') ~ m(1) }}", "<x><1>"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2, 3] %}{% set ns.n = ns.n + i %}"
         "{% endfor %}{{ ns.n }}", "6"),
        ("{% set s %}a{{ 1 }}{% endset %}{{ s * 2 }}{{ 'ab'[::-1] }}", "a1a1ba"),
        ("{{ ['a', 'b'] | join('-') }}{{ t | map(attribute='v') | join(',') }}", "a-b1"),
        ("{{ 'a b'.split(' ')[1].strip() | upper }}{{ 'x' | replace('x', 'y') }}", "By"),
        ("{{ '%02d' % 3 }}{{ '%s!' | format('a') }}{{ '{:>3}'.format(1) }}", "03a!  1"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ missing is defined }}{{ missing }}", "False"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, output: str) -> None:
    x = {"b": "<é>'", "a": 1}
    assert _render(source, x=x, t=[{"v": 1, "c": [{"v": 2, "c": []}]}]) == output


def test_special_tokens_tools_and_documents_reach_the_template() -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ tools | tojson }}{{ documents | length }}"
    text = _text(source + "{{ messages[0].content }}", bos_token="<s>")  # noqa: S106
    shown = text.apply_chat_template(HELLO, tools=[{"name": "f"}], documents=[{"text": "d"}])
    assert shown == '<s>[{"name": "f"}]1Hello'


def test_a_template_may_refuse_with_its_own_words() -> None:
    with pytest.raises(TemplateError, match="Roles must alternate"):
        _render("{{ raise_exception('Roles must alternate') }}")


# --- messages -----------------------------------------------------------------------------------

PARTS_ONLY = (
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    "[{{ p.text }}]{% endfor %}{% endfor %}"
)


def test_content_takes_the_form_that_the_template_understands() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]
    assert "user\na\nb<|im_end|>" in _text(CHATML).apply_chat_template(parts)
    assert _text(PARTS_ONLY).apply_chat_template(parts) == "[a][b]"
    assert _text(PARTS_ONLY).apply_chat_template(HELLO) == "[Hello]"


def test_an_image_for_a_text_template_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"text only[\s\S]*image"):
        _text(CHATML).apply_chat_template(IMAGE)


@pytest.mark.parametrize(
    "message",
    [
        "Hello",
        {},
        {"content": "x"},
        {"role": 1, "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text"}]},
    ],
)
def test_a_malformed_message_is_named(message: Any) -> None:
    with pytest.raises(UsageError, match=r"messages\[1\]"):
        _text(CHATML).apply_chat_template([*HELLO, message])


def test_a_base_model_says_so() -> None:
    text = _text(None)
    assert not text.has_chat_template
    with pytest.raises(UsageError, match="base model"):
        text.apply_chat_template(HELLO)


# --- hostile templates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system(command) }}",
        "{{ joiner.__init__.__globals__['os'].system(command) }}",
        "{{ namespace.__init__.__globals__.os.system(command) }}",
        "{{ raise_exception.__globals__['json'].codecs.builtins.open(marker, 'w') }}",
        "{{ strftime_now.__globals__.__builtins__.open(marker, 'w') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "{{ [1] | map(attribute='__class__') | list }}",
        "{{ [1] | map('attr', '__class__') | list }}",
        "{{ [1] | selectattr('__class__') | list }}",
        "{{ [1] | sort(attribute='__class__') }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ (1).__class__.__base__ }}",
        "{{ messages.__len__ }}",
    ],
)
def test_no_way_out_of_the_sandbox(source: str, tmp_path: Path) -> None:
    marker = tmp_path / "escaped"
    variables = {"messages": [{"role": "user"}], "marker": str(marker)}
    variables["command"] = f"touch {marker}"
    with pytest.raises(TemplateError, match="sandbox"):
        _render(source, **variables)
    assert not marker.exists()
    assert variables["messages"] == [{"role": "user"}]


@pytest.mark.parametrize(
    "source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"]
)
def test_a_template_reads_no_files(source: str) -> None:
    with pytest.raises(TemplateError):
        _render(source)


def test_an_escape_through_text_leaves_no_trace(tmp_path: Path) -> None:
    marker = tmp_path / "escaped"
    source = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    for call in (_text(source).apply_chat_template, _text(source).encode_chat):
        with pytest.raises(TemplateError, match="sandbox"):
            call(HELLO)
    assert not marker.exists()
    os.system("true")  # noqa: S605 (the very function that must not have been called works)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for x in t recursive %}{{ loop(t) }}{% endfor %}",
        "{{ range(1000000000) | list }}",
        "{{ ('a' * 99999999) | length }}",
        "{{ ([0] * 99999999) | length }}",
        "{{ 9 ** 999 ** 2 ** 9 ** 9 }}",
        "{{ (9 ** 999) * (9 ** 999) * (9 ** 999) }}",
        "{% set n = namespace(s='a') %}{% for i in x * 99 %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in x * 99 %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}"
        "{% set q %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = q %}{% endfor %}",
        "{{ 'a'.ljust(99999999) | length }}",
        "{{ ('a'.replace('', 'b' * 100000).replace('', 'c' * 100000)) | length }}",
        "{{ ('a' * 100000) | replace('', 'c' * 100000) | length }}",
        "{{ '{:99999999}'.format(1) | length }}",
        "{{ '{:{}}'.format(1, 99999999) | length }}",
        "{{ ('%99999999d' % 1) | length }}",
        "{{ ('%*d' % (99999999, 1)) | length }}",
        "{{ '%99999999d' | format(1) | length }}",
        "{{ ('a' * 100000) | list | join('b' * 100000) | length }}",
        "{{ ('a' * 100000).join(('b' * 100000) | list) | length }}",
        "{{ 'a' | indent(99999999, true) | length }}",
        "{{ [1] | tojson(indent=99999999) | length }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "".join(
            f"{{% macro m{i}() %}}{{{{ m{i + 1}() }}}}{{{{ m{i + 1}() }}}}{{% endmacro %}}"
            for i in range(60)
        )
        + "{% macro m60() %}{% endmacro %}{{ m0() }}",
    ],
)  # fmt: skip
def test_a_runaway_template_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_mmllm.text.bounds.MAX_STEPS", 20_000)
    with pytest.raises(TemplateError, match="too much time or memory"):
        _render(source, t=[1, 2], x=[0])


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_mmllm.text.template.MAX_OUTPUT_CHARS", 1000)
    source = "{% for i in range(100) %}{{ 'x' * n }}{% endfor %}"
    assert _render(source, n=10) == "x" * 1000
    with pytest.raises(TemplateError, match="of output"):
        _render(source, n=11)


def test_the_bounds_count_anew_for_each_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_mmllm.text.bounds.MAX_STEPS", 100)
    template = ChatTemplate("{% for i in range(60) %}{% endfor %}ok")
    assert [template.render({}) for _ in range(3)] == ["ok"] * 3


def test_cpu_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_mmllm.text.bounds.MAX_CPU_S", -1.0)
    with pytest.raises(TemplateError, match="too much time"):
        _render("{% for i in [1] %}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% if %}", "line 1"),
        ("a\n{% endfor %}", "line 2"),
        ("{{ missing.attribute }}", "missing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' | nofilter }}", "nofilter"),
        ("x" * (1 << 20) + "x", "too large"),
    ],
)
def test_a_broken_template_is_a_template_error(source: str, found: str) -> None:
    with pytest.raises(TemplateError, match=found):
        _render(source)
