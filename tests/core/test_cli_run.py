"""`edge-mmllm run` and `edge-mmllm chat`."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edge_mmllm
from edge_mmllm.cli.chat import interruptible
from edge_mmllm.errors import EdgeError, UsageError
from edge_mmllm.text import Text
from edge_mmllm_runtime.answer import Answer, AnswerSettings, answer
from edge_mmllm_runtime.chat import Conversation, chat
from edge_mmllm_runtime.continuation import following

SHORT = ("--max-new-tokens", 12)


def _generated(bundle: Path, prompt: Any, **options: Any) -> str:
    with edge_mmllm.load(bundle) as session:
        return "".join(session.generate(prompt, max_new_tokens=12, **options))


def test_the_answer_goes_to_stdout(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("run", chat_bundle, "--prompt", "Hello", *SHORT)
    assert done.status == 0
    expected = _generated(chat_bundle, [{"role": "user", "content": "Hello"}])
    assert done.stdout == expected + "\n"
    assert "12 tokens (length)" in done.stderr


def test_raw_uses_no_template(cli: Callable[..., Any], chat_bundle: Path) -> None:
    raw = cli("run", chat_bundle, "--prompt", "Hello", *SHORT, "--raw", "--json").json
    chatted = cli("run", chat_bundle, "--prompt", "Hello", *SHORT, "--json").json
    assert raw["text"] == _generated(chat_bundle, "Hello")
    assert raw["prompt_tokens"] == len("Hello")
    assert chatted["prompt_tokens"] == len("<user>Hello\n<assistant>")


def test_json_is_one_document(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("run", chat_bundle, "--prompt", "x", *SHORT, "--threads", 1, "--json")
    told = done.json
    assert done.stderr == ""
    assert told["new_tokens"] == 12
    assert told["finish_reason"] == "length"
    assert told["threads"] == 1
    assert told["engine"] == "onnx"
    assert min(told["ttft_ms"], told["load_ms"], told["decode_tokens_per_s"]) > 0


def test_the_prompt_may_come_from_stdin(cli: Callable[..., Any], chat_bundle: Path) -> None:
    given = cli("run", chat_bundle, "--prompt", "Two\nlines", *SHORT)
    piped = cli("run", chat_bundle, "--prompt", "-", *SHORT, stdin="Two\nlines")
    assert piped.stdout == given.stdout
    broken = cli("run", chat_bundle, "--prompt", "-", stdin=b"\xff\xfe")
    assert broken.status == 2
    assert "UTF-8" in broken.stderr


def test_sampling_is_repeatable_by_seed(cli: Callable[..., Any], chat_bundle: Path) -> None:
    words = ("run", chat_bundle, "--prompt", "x", *SHORT, "--temperature", 5, "--top-k", 50,
             "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1)  # fmt: skip
    one, again, other = (cli(*words, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == again != other


def test_a_stop_string_ends_the_answer(cli: Callable[..., Any], chat_bundle: Path) -> None:
    whole = cli("run", chat_bundle, "--prompt", "x", *SHORT, "--json").json["text"]
    stop = whole[4:6]
    told = cli("run", chat_bundle, "--prompt", "x", *SHORT, "--stop", stop, "--stop", "☃", "--json")
    assert told.json["text"] == whole[: whole.index(stop)]
    assert told.json["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "status", "kind"),
    [
        (["--temperature", "-1"], 2, "UsageError"),
        (["--top-p", "7"], 2, "UsageError"),
        (["--stop", ""], 2, "UsageError"),
        (["--context", "100000"], 2, "UsageError"),
        (["--context", "4"], 1, "ContextFull"),
    ],
)
def test_bad_settings(
    cli: Callable[..., Any], chat_bundle: Path, options: list[str], status: int, kind: str
) -> None:
    done = cli("run", chat_bundle, "--prompt", "Hello", *options, "--json")
    assert done.status == status
    assert done.json["error"]["type"] == kind


def test_a_chat_beyond_its_context_says_how_to_go_on(
    cli: Callable[..., Any], chat_bundle: Path
) -> None:
    typed = "Hello\nHello\n/reset\nHello\n"
    done = cli("chat", chat_bundle, "--context", 40, *SHORT, stdin=typed)
    assert done.status == 0
    assert done.stderr.count("/reset forgets the conversation") == 1
    answers = done.stdout.splitlines()
    assert len(answers) >= 2
    assert done.stdout.count(answers[0]) == 2  # before and after the reset


def test_a_bundle_without_a_tokenizer(cli: Callable[..., Any], base_bundle: Path) -> None:
    done = cli("run", base_bundle, "--prompt", "x")
    assert done.status == 2
    assert "no tokenizer" in done.stderr


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_malicious_template_is_an_error(
    cli: Callable[..., Any],
    make_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_checkpoint(template)
    assert cli("export", made, "--out", "out", "--gate", "off", "--threads", 1).status == 0
    done = cli("run", "out", "--prompt", "x", "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "TemplateError"
    assert cli("chat", "out", stdin="x\n").status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert cli("run", "out", "--prompt", "x", "--raw", *SHORT).status == 0


def test_control_characters_of_an_answer_reach_files_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from edge_mmllm.cli.run import writer

    writer()("a\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writer()("b\x1b[2J")
    assert capsys.readouterr().out == "a\x1b[2Jb\ufffd[2J"


# -- state files ----------------------------------------------------------------------------------


def _run(cli: Callable[..., Any], bundle: Path, prompt: str, *options: object) -> Any:
    done = cli("run", bundle, "--prompt", prompt, *options, *SHORT, "--json")
    assert done.status == 0, done.stderr
    return done.json


def test_a_conversation_goes_on_from_a_file(
    cli: Callable[..., Any], chat_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "talk.state"
    turns: list[dict[str, str]] = []
    restored = 0
    for said in ("Hi", "And?"):
        turns.append({"role": "user", "content": said})
        options = ("--state", state) if restored else ()
        told = _run(cli, chat_bundle, said, *options, "--save-state", state)
        assert told["text"] == _generated(chat_bundle, turns)
        assert told["restored_tokens"] == restored
        assert told["saved_state_bytes"] == state.stat().st_size
        # The template ends an answer with a line end, which only the next turn reads.
        begin = "" if restored == 0 else "\n"
        assert told["prompt_tokens"] == len(f"{begin}<user>{said}\n<assistant>")
        restored += told["prompt_tokens"] + told["new_tokens"]
        turns.append({"role": "assistant", "content": told["text"]})
        with edge_mmllm.load(chat_bundle) as session:
            assert session.load_state(state) == restored
            text = session.text.apply_chat_template(turns)
            assert session.tokens == tuple(session.text.encode(text)[:restored])


def test_raw_text_goes_on_from_a_file(
    cli: Callable[..., Any], chat_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "s.state"
    for storage in ("f32", "f16", "int8"):
        options = ("--raw", "--state-storage", storage)
        first = _run(cli, chat_bundle, "Hello", *options, "--save-state", state)
        second = _run(cli, chat_bundle, ", and", *options, "--state", state)
        if storage == "f32":
            size = first["saved_state_bytes"]
            with edge_mmllm.load(chat_bundle) as session:
                session.load_state(state)
                assert session.tokens is not None  # ids, as <unk> would not encode as itself
                whole = [*session.tokens, *session.text.encode(", and")]
            assert second["text"] == _generated(chat_bundle, whole)
        assert second["restored_tokens"] == len("Hello") + 12
        assert second["saved_state_bytes"] is None
    assert 0.25 * size < state.stat().st_size < 0.75 * size
    done = cli("run", chat_bundle, "--prompt", "x", "--state", state, *SHORT, "--raw")
    assert "17 restored + 1 + 12 tokens (length)" in done.stderr


def test_a_state_without_an_answer(
    cli: Callable[..., Any], chat_bundle: Path, tmp_path: Path
) -> None:
    """`--max-new-tokens 0` only reads; a stop string and a full context leave a whole state too."""
    state = tmp_path / "s.state"
    cli(
        "run", chat_bundle, "--prompt", "Hel", "--raw", "--max-new-tokens", 0, "--save-state", state
    )
    told = _run(cli, chat_bundle, "lo", "--raw", "--state", state)
    whole = _generated(chat_bundle, "Hello")
    assert (told["text"], told["restored_tokens"]) == (whole, 3)
    _run(cli, chat_bundle, "Hello", "--raw", "--stop", whole[4:6], "--save-state", state)
    with edge_mmllm.load(chat_bundle) as session:
        session.load_state(state)
        assert session.text.decode(session.tokens or ()) == "Hello" + whole[:6]
    full = _run(cli, chat_bundle, "Hello", "--raw", "--context", 9, "--save-state", state)
    assert full["finish_reason"] == "context"
    with edge_mmllm.load(chat_bundle) as session:
        assert session.load_state(state) == 9


def test_the_model_s_end_is_not_part_of_the_state(
    chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _generated(chat_bundle, "Hello")
    end = whole[5]
    with edge_mmllm.load(chat_bundle) as session:
        ids = session.text.encode(end)
        session.spec = replace(session.spec, text=replace(session.spec.text, eos_ids=tuple(ids)))
        given = answer(session, "Hello", AnswerSettings(max_new_tokens=12), whole=True)
        assert (given.finish_reason, given.text) == ("eos", whole[: whole.index(end)])
        assert session.text.decode(session.tokens or ()) == "Hello" + given.text


def test_a_foreign_or_damaged_state_is_refused(
    cli: Callable[..., Any], chat_bundle: Path, base_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "s.state"
    with edge_mmllm.load(base_bundle) as session:
        session.prefill([1, 2, 3])
        session.save_state(state)
    words = ("run", chat_bundle, "--prompt", "x", "--json", "--state", state)
    refused = cli(*words, "--save-state", state)
    assert refused.status == 1
    assert refused.json["error"]["type"] == "StateMismatch"
    assert "another bundle" in refused.stderr
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    assert cli(*words).json["error"]["type"] == "CorruptState"
    state.unlink()
    missing = cli(*words)
    assert missing.status == 1
    assert "No such file" in missing.stderr


def test_what_is_no_state_file_is_not_replaced(
    cli: Callable[..., Any], chat_bundle: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    words = ("run", chat_bundle, "--prompt", "x", "--json", "--save-state")
    refused = cli(*words, notes)
    assert (refused.status, refused.json["error"]["type"]) == (1, "OutputExists")
    assert notes.read_text() == "precious"
    assert cli(*words, tmp_path / "none" / "s.state").status == 2
    assert cli(*words, tmp_path / "s.state", "--state-storage", "int4").status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_template_that_forgets_answers_needs_raw(chat_bundle: Path) -> None:
    forgetful = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with edge_mmllm.load(chat_bundle) as session:
        assert following(session, "Hi", {}, raw=True).ids.tolist() == session.text.encode("Hi")
        turn = session.text.encode("\n<user>Hi\n<assistant>")
        assert following(session, "Hi", {}, raw=False).ids.tolist() == turn
        spec = replace(session.text.spec, bos_id=5, add_bos=True)
        session._text = Text(spec, session.text._json)
        assert session.text.encode("Hi")[0] == 5
        assert (
            following(session, "Hi", {}, raw=False).ids.tolist() == turn
        )  # BOS begins a text, not a turn
        spec = replace(spec, chat_template=forgetful)
        session._text = Text(spec, session.text._json)
        with pytest.raises(UsageError, match="does not repeat"):
            following(session, "Hi", {}, raw=False)


# -- chat ---------------------------------------------------------------------------------------


def test_a_conversation(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("chat", chat_bundle, *SHORT, stdin="Hi\n\n/help\nAnd?\n/reset\nHi\n/exit\nnever\n")
    assert done.status == 0
    first = _generated(chat_bundle, [{"role": "user", "content": "Hi"}])
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    assert done.stdout == f"{first}\n{_generated(chat_bundle, turns)}\n{first}\n"
    assert "/reset forgets" in done.stderr
    assert "the conversation was forgotten" in done.stderr


def test_a_turn_that_fails_does_not_end_the_conversation(
    cli: Callable[..., Any], chat_bundle: Path
) -> None:
    done = cli("chat", chat_bundle, *SHORT, stdin="Hi\n" + "x" * 200 + "\n/reset\nHi\n")
    answers = done.stdout.splitlines()
    assert done.status == 0
    assert "the context is full" in done.stderr
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_a_turn_reads_only_what_is_new(chat_bundle: Path) -> None:
    with edge_mmllm.load(chat_bundle) as session:
        talk = Conversation(session, AnswerSettings(max_new_tokens=4), system="Be kind.")
        talk.say("Hi", lambda piece: None)
        known = session.position
        read: list[int] = []
        forward = session.engine.forward

        def counted(chunk: Any, position: int, rows: Any) -> Any:
            read.append(len(chunk))
            return forward(chunk, position, rows)

        session.engine.forward = counted  # type: ignore[method-assign]
        talk.say("And?", lambda piece: None)
        assert sum(read) <= session.position - known
        assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
        talk.reset()
        assert talk.messages == [{"role": "system", "content": "Be kind."}]


def test_a_base_model_needs_raw(
    cli: Callable[..., Any], make_checkpoint: Callable[[str | None], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("export", make_checkpoint(None), "--out", out, "--gate", "off", "--threads", 1)
    refused = cli("chat", out, stdin="Hi\n")
    assert refused.status == 2
    assert "no chat template" in refused.stderr
    assert cli("chat", out, "--raw", *SHORT, stdin="Hi\n").stdout == _generated(out, "Hi") + "\n"


def test_text_that_is_not_unicode_is_refused(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("chat", chat_bundle, *SHORT, stdin=b"\xff\nHi\n")
    assert done.status == 0
    assert "not valid Unicode" in done.stderr
    assert done.stdout == _generated(chat_bundle, [{"role": "user", "content": "Hi"}]) + "\n"


def test_ctrl_c_stops_an_answer_and_not_the_conversation(chat_bundle: Path) -> None:
    shown: list[str] = []
    notes: list[str] = []

    def write(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    with edge_mmllm.load(chat_bundle) as session:
        talk = Conversation(session, AnswerSettings(max_new_tokens=12))
        turns = chat(talk, iter(["Hi", "And?"]), write, notes.append, interruptible)
        first, second = talk.messages[1]["content"], talk.messages[3]["content"]
    whole = _generated(chat_bundle, [{"role": "user", "content": "Hi"}])
    assert turns == 2
    assert len(first) == 3
    assert whole.startswith(first)
    assert len(second) == 12
    assert notes[0] == "(the answer was cut: cancelled)"
    expected = [*({"role": r, "content": c} for r, c in
                  (("user", "Hi"), ("assistant", first), ("user", "And?")))]  # fmt: skip
    assert second == _generated(chat_bundle, expected)


def test_ctrl_c_twice_ends_everything() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as cancelled:
        signal.raise_signal(signal.SIGINT)
        assert cancelled()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_long_prompt_is_cancelled_between_its_chunks(chat_bundle: Path) -> None:
    with edge_mmllm.load(chat_bundle) as session:
        session.chunk = 8
        given = answer(session, "x" * 50, AnswerSettings(), cancelled=lambda: True)
        assert isinstance(given, Answer)
        assert (given.finish_reason, given.text, given.new_tokens) == ("cancelled", "", 0)
        assert given.ttft_ms is None
        assert session.position == 0


def test_a_conversation_needs_a_tokenizer(base_bundle: Path) -> None:
    with edge_mmllm.load(base_bundle) as session, pytest.raises(UsageError):
        Conversation(session, AnswerSettings(), raw=True)


def test_the_stage_file_is_needed(
    cli: Callable[..., Any], base_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_bundle, tmp_path / "out")
    (tmp_path / "out" / "decoder.onnx").unlink()
    done = cli("run", tmp_path / "out", "--prompt", "x")
    assert done.status == 1
    assert "decoder.onnx" in done.stderr
    with pytest.raises(EdgeError):
        edge_mmllm.load(tmp_path / "out")
