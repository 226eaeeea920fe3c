"""A chat template in mlc-llm's words: fixed strings around system prompt and messages.

mlc-llm runs no Jinja. The strings are found by letting the model's own template write a dialog of
marks, and cutting the result at the marks. What comes of it is put together again as mlc-llm would
and compared; a template that is more than strings around messages becomes plain completion.

Source: mlc-llm, `protocol/conversation_protocol.py`.
"""

from __future__ import annotations

from typing import Any

from edge_mmllm.errors import EdgeError
from edge_mmllm.text import Text
from edge_mmllm_export.checkpoints.base import TextAssets

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "@@system@@", "@@user@@", "@@assistant@@", "@@again@@"
_MARKS = (_SYSTEM, _USER, _ASSISTANT, _AGAIN)
_DIALOG = (("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN))
#: What is compared besides: one question, and a longer dialog.
_OTHERS = (_DIALOG[:1], (*_DIALOG, ("assistant", "Yes."), ("user", "Why?")))

Template = dict[str, Any]


def conversation(text: TextAssets) -> Template:
    """The `conv_template` of a model: its chat template's, or plain completion."""
    plain = _template(text, name="LM", system="{system_message}", user="", assistant="", seps=[""])
    if text.spec.chat_template is None:
        return plain
    try:
        found = _derived(text, Text(text.spec, text.tokenizer_json))
    except EdgeError:
        return plain
    return found or plain


def _template(
    text: TextAssets,
    *,
    name: str,
    system: str,
    user: str,
    assistant: str,
    seps: list[str],
    message: str = "",
    answer: str = "{assistant_message}",
) -> Template:
    """All fields of mlc-llm's class."""
    spec = text.spec
    out: Template = {
        "name": name,
        "system_template": system,
        "system_message": message,
        "add_role_after_system_message": True,
        "roles": {"user": user, "assistant": assistant, "tool": user},
        "role_templates": {
            "user": "{user_message}",
            "assistant": answer,
            "tool": "{tool_message}",
        },
        "messages": [],
        "seps": seps,
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [spec.eos_token] if spec.eos_token else [],
        "stop_token_ids": list(spec.eos_ids),
        "function_string": "",
        "use_function_calling": False,
    }
    if _begins(text):
        out["system_prefix_token_ids"] = [spec.bos_id]
    return out


def _begins(text: TextAssets) -> bool:
    """Whether every prompt begins with BOS: by setting, by chat template, or by tokenizer."""
    spec = text.spec
    if spec.bos_id is None:
        return False
    if spec.add_bos or "bos_token" in (spec.chat_template or ""):
        return True
    if spec.tokenizer != "tokenizers":
        return False
    return Text(spec, text.tokenizer_json).encode("a")[:1] == [spec.bos_id]


def _derived(text: TextAssets, writer: Text) -> Template | None:
    """None where strings around messages do not say what the template says."""
    bos = (text.spec.bos_token or "") if _begins(text) else ""

    def written(*messages: tuple[str, str]) -> str:
        whole = [{"role": role, "content": content} for role, content in messages]
        return writer.apply_chat_template(whole).removeprefix(bos)

    expected = written(*_DIALOG)
    bare = _cut(expected, _MARKS[1:])
    if bare is None:
        return None
    try:
        said = _cut(written(("system", _SYSTEM), *_DIALOG), _MARKS)
    except EdgeError:  # templates that know no system prompt say so
        said = None
    # first, then: user's separator and assistant's role; assistant's and user's; before an answer
    first, turn, back, last = bare
    shared = _tidy(_common(turn, back))
    user = _common(first[::-1], back[::-1])[::-1]
    for seps, role in (([shared], back[len(shared) :]), (["", back.removesuffix(user)], user)):
        if not first.endswith(role) or not (turn.startswith(seps[0]) and last.startswith(seps[0])):
            continue
        # A template may begin an answer with less than it writes before one.
        begins = last if turn.startswith(last) else turn
        system = first.removesuffix(role)
        form, message = _system(system, role, said, [turn, back, last])
        found = _template(
            text,
            name="custom",
            system=form,
            message=message,
            user=role,
            assistant=begins[len(seps[0]) :],
            answer=turn[len(begins) :] + "{assistant_message}",
            seps=seps,
        )
        if all(prompt(found, d) == written(*d) for d in (_DIALOG, *_OTHERS)):
            return found
    return None


def _system(system: str, user: str, said: list[str] | None, rest: list[str]) -> tuple[str, str]:
    """The system prompt's form, and the one that stands there where nobody gives any."""
    if said is not None and said[1].endswith(user) and said[2:] == rest:
        begin, end = said[0], said[1].removesuffix(user)
        inside = system.removeprefix(begin).removesuffix(end)
        if begin + inside + end == system:
            return begin + "{system_message}" + end, inside
    return "{system_message}", system


def _cut(text: str, marks: tuple[str, ...]) -> list[str] | None:
    """The pieces around the marks; None unless each is there once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    pieces.append(text)
    return None if any(mark in piece for piece in pieces for mark in _MARKS) else pieces


def _common(a: str, b: str) -> str:
    """What both begin with."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return a[:count]


def _tidy(shared: str) -> str:
    """A shared beginning without the tag that names a role, e.g. of `<|end|>\n<|`."""
    tag = shared.rfind("<")
    return shared[:tag] if tag > 0 else shared


def prompt(template: Template, messages: tuple[tuple[str, str], ...]) -> str:
    """What mlc-llm makes of messages, and the beginning of an answer."""
    out = template["system_template"].replace("{system_message}", template["system_message"])
    for role, content in messages:
        body = template["role_templates"][role].replace(f"{{{role}_message}}", content)
        sep = template["seps"][-1 if role == "assistant" else 0]
        out += template["roles"][role] + template["role_content_sep"] + body + sep
    out += template["roles"]["assistant"] + template["role_empty_sep"]
    return str(out)
