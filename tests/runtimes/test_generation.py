"""Generation: greedy against the reference, ends, streaming, reuse of the state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import toys

from edge_mmllm.errors import Cancelled, ContextFull, SessionClosed, UsageError
from edge_mmllm_runtime.sampling import Sampling

PROMPT = "Once upon a time"
IDS = list(PROMPT.encode())
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def greedy(toy, ids, count):
    """The reference's own greedy continuation."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(toy.reference(np.array(ids))[-1].argmax()))
    return ids[-count:]


def text_spec(toy, **changes):
    return replace(toy, spec=replace(toy.spec, text=replace(toy.spec.text, **changes)))


@pytest.fixture(params=["recurrent", "attention"])
def toy(request, tmp_path):
    return getattr(toys, request.param)(tmp_path)


class Script:
    """An engine that says what it is told, whatever it reads: for tests of the text's path."""

    name, version, threads, capacity = "script", "0", 1, None
    accepts_embeddings, state_capacity_bytes = False, 0

    def __init__(self, answer: list[int], prompt_length: int) -> None:
        self.answer, self.start, self.read = answer, prompt_length - 1, []

    def _logits(self, position):
        logits = np.zeros(toys.VOCAB, np.float32)
        at = position - self.start
        logits[self.answer[at] if at < len(self.answer) else ord("~")] = 1
        return logits

    def forward(self, chunk, position, rows):
        self.read += chunk.tolist()
        return np.stack([self._logits(position + r) for r in rows])

    def step(self, token, position):
        self.read.append(token)
        return self._logits(position)

    def clear(self):
        self.read = []

    def rewind(self, position, to):
        return position == to

    def mark(self, position):
        return None

    def rollback(self, mark): ...

    def save(self, position):
        return {}

    def load(self, states, position): ...

    def close(self): ...


def scripted(toy, answer, prompt=PROMPT, **changes):
    """A session whose model answers `answer` (text, bytes or ids) to `prompt`."""
    from edge_mmllm_runtime.session import Session

    ids = list(answer.encode() if isinstance(answer, str) else answer)
    spec = text_spec(toy, **changes).spec
    engine = Script(ids, len(prompt.encode()))
    return Session(engine, replace(spec, states=()), "0" * 64, toys.make_text(spec))


@pytest.fixture
def recurrent(tmp_path):
    return toys.recurrent(tmp_path)


def test_greedy_equals_the_reference(toy):
    with toy.session(chunk=5) as session:
        expected = greedy(toy, IDS, 20)
        assert list(session.generate_tokens(IDS, 20)) == expected
        assert session.finish_reason == "length"
        assert session.tokens == tuple(IDS + expected[:-1])
        assert list(session.generate_tokens(IDS, 20)) == expected
        assert list(session.generate_tokens(PROMPT, 20)) == expected


def test_every_end_of_sequence_token_ends(toy):
    expected = greedy(toy, IDS, 20)
    for end in {expected[3], expected[7]}:
        stopped = text_spec(toy, eos_ids=(255, end) if end != 255 else (end,))
        with stopped.session() as session:
            found = list(session.generate_tokens(IDS, 20))
            assert found == expected[: expected.index(end)]
            assert session.finish_reason == "eos"
            assert list(session.generate_tokens(IDS, 20, ignore_eos=True)) == expected


def test_context_end(tmp_path):
    toy = toys.attention(tmp_path)
    with toy.session(20) as session:
        found = list(session.generate_tokens(IDS, 50))
        assert session.finish_reason == "context"
        assert found == greedy(toy, IDS, 20 - len(IDS) + 1)
        version = session.version
        with pytest.raises(ContextFull):
            session.generate_tokens(list(range(21)), 1)
        with pytest.raises(ContextFull):
            session.generate_many([PROMPT, "x" * 21])
        assert session.version == version


def test_go_on_from_a_branch(toy):
    expected = greedy(toy, IDS, 12)
    with toy.session() as session:
        session.prefill(IDS)
        snapshot = session.snapshot()
        for _ in range(2):
            session.restore(snapshot)
            assert list(session.generate_tokens(None, 12)) == expected
        with pytest.raises(UsageError, match="go on"):
            session.generate_tokens(None, 1)
        session.decode(expected[-1])
        assert list(session.generate_tokens(None, 4)) == greedy(toy, IDS + expected, 4)


def test_sampling_is_reproducible(toy):
    settings = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=3)
    with toy.session() as session:
        runs = [list(session.generate_tokens(IDS, 30, settings)) for _ in range(2)]
        other = list(session.generate_tokens(IDS, 30, replace(settings, seed=4)))
    assert runs[0] == runs[1] != other


def test_reuse_reads_only_what_is_new(toy):
    def reads(session, call):
        chunks, forward = [], session.engine.forward
        session.engine.forward = lambda c, p, r: chunks.append(len(c)) or forward(c, p, r)
        result = call()
        session.engine.forward = forward
        return sum(chunks), result

    with toy.session() as session:
        answer = list(session.generate_tokens(IDS, 5))
        longer = IDS + answer + [1, 2, 3]
        count, found = reads(session, lambda: list(session.generate_tokens(longer, 5, reuse=True)))
        assert count == 4  # the last token of the answer, and three new ones
        assert found == greedy(toy, longer, 5)
        # A prompt that parts from the state: cut where that is possible, else read all again.
        other = [*IDS, 9, 9]
        count, found = reads(session, lambda: list(session.generate_tokens(other, 5, reuse=True)))
        assert count == (2 if toy.spec.states[0].grows else len(other))
        assert found == greedy(toy, other, 5)
        # The very state: nothing to read.
        session.reset()
        session.prefill(IDS)
        count, found = reads(session, lambda: list(session.generate_tokens(IDS, 5, reuse=True)))
        assert count == 0
        assert found == greedy(toy, IDS, 5)
        # Shorter than the state.
        count, found = reads(session, lambda: list(session.generate_tokens(IDS, 5, reuse=True)))
        assert count == (1 if toy.spec.states[0].grows else len(IDS))
        assert found == greedy(toy, IDS, 5)


def test_two_generations_at_once_are_refused(toy):
    with toy.session() as session:
        first = session.generate_tokens(IDS, 10)
        next(first)
        session.decode(1)
        with pytest.raises(UsageError, match="something else"):
            next(first)


def test_generate_many_equals_separate_calls(toy):
    prompts = [PROMPT, "abc", [1, 2, 3]]
    with toy.session() as session:
        expected = ["".join(session.generate(p, max_new_tokens=8)) for p in prompts]
        assert session.generate_many(prompts, max_new_tokens=8) == expected


def test_pieces_are_whole_characters(recurrent):
    answer = "naïve 日本語 🙂!"
    with scripted(recurrent, answer) as session:
        found = list(session.generate(PROMPT, max_new_tokens=len(answer.encode())))
    assert "".join(found) == answer
    assert "🙂" in found
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_cut_by_the_end_is_not_shown(recurrent):
    with scripted(recurrent, "ab🙂") as session:
        assert "".join(session.generate(PROMPT, max_new_tokens=4)) == "ab"


@pytest.mark.parametrize(
    ("answer", "stop", "expected", "reason"),
    [
        ("one two END three", "END", "one two ", "stop"),
        ("one two END three", ("three", "END"), "one two ", "stop"),
        ("ENENEND!", "END", "ENEN", "stop"),
        ("EN", ("END",), "EN~~~", "length"),
        ("日本END", "本E", "日", "stop"),
        ("abEN", ("END",), "abEN", "eos"),
    ],
)
def test_stop_strings_never_leak(recurrent, answer, stop, expected, reason):
    ids = list(answer.encode()) + ([0] if reason == "eos" else [])
    with scripted(recurrent, ids, eos_ids=(0,)) as session:
        found = list(
            session.generate(PROMPT, stop=stop, max_new_tokens=5 if "~" in expected else 40)
        )
        assert "".join(found) == expected
        assert session.finish_reason == reason


def test_bos_is_added_once_to_text_and_not_to_ids(recurrent):
    with scripted(recurrent, "x", bos_id=1, add_bos=True) as session:
        next(session.generate(PROMPT))
        assert session.engine.read[: len(IDS) + 1] == [1, *IDS]
        session.close()
    with scripted(recurrent, "x", bos_id=1, add_bos=True) as session:
        next(session.generate_tokens([1, *IDS]))
        assert session.engine.read[:3] == [1, *IDS[:2]]


def test_messages_go_through_the_chat_template(recurrent):
    messages = [{"role": "user", "content": "Hi"}]
    rendered = "<user>Hi\n<assistant>"
    with scripted(recurrent, "Yes", rendered, chat_template=CHATML) as session:
        assert "".join(session.generate(messages, max_new_tokens=3)) == "Yes"
        assert bytes(session.engine.read[: len(rendered)]).decode() == rendered
        with pytest.raises(UsageError, match="list"):
            session.generate(messages[0])


def test_a_bundle_without_tokenizer_takes_ids(recurrent):
    toy = text_spec(recurrent, tokenizer="none")
    with toy.session() as session:
        assert list(session.generate_tokens(IDS, 3)) == greedy(recurrent, IDS, 3)
        with pytest.raises(UsageError, match="no tokenizer"):
            session.generate(PROMPT)


@pytest.mark.parametrize(
    "arguments",
    [
        {"images": ["cat.png"]},
        {"audio": ["hello.wav"]},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"temperature": -1.0},
        {"max_new_tokens": -1},
        {"prompt_or_messages": []},
        {"prompt_or_messages": ""},
        {"prompt_or_messages": [300]},
        {"prompt_or_messages": None},
    ],
    ids=str,
)
def test_wrong_calls_fail_at_once(recurrent, arguments):
    with recurrent.session() as session:
        session.generate_tokens(IDS, 1)
        session.prefill(IDS)
        session.drop_logits()
        version = session.version
        with pytest.raises(UsageError):
            session.generate(**{"prompt_or_messages": PROMPT} | arguments)
        assert session.version == version


def test_no_new_tokens(toy):
    with toy.session() as session:
        assert list(session.generate_tokens(IDS, 0)) == []
        assert session.position == len(IDS)


def test_a_long_prompt_can_be_cancelled(toy):
    def progress(done, total):
        raise Cancelled("enough")

    with toy.session(chunk=4) as session:
        with pytest.raises(Cancelled):
            list(session.generate(PROMPT, progress=progress))
        assert session.position == 0
        assert list(session.generate_tokens(IDS, 3)) == greedy(toy, IDS, 3)


def test_closed_session(toy):
    session = toy.session()
    running = session.generate_tokens(IDS, 10)
    next(running)
    session.close()
    with pytest.raises(SessionClosed):
        next(running)
    with pytest.raises(SessionClosed):
        session.generate_tokens(IDS, 10)


@pytest.mark.parametrize("prompt", [b"bytes are ids to Python", 5, {1, 2}, iter([1, 2])], ids=repr)
def test_prompts_of_a_wrong_type(toy, prompt):
    with toy.session() as session, pytest.raises(UsageError, match="a prompt is text"):
        session.generate(prompt)


@pytest.mark.parametrize("count", [2.0, "2", None, -1])
def test_a_count_that_is_no_whole_number_is_refused_at_once(toy, count):
    with toy.session() as session:
        with pytest.raises(UsageError, match="max_new_tokens"):
            session.generate(PROMPT, max_new_tokens=count)
        assert len(list(session.generate_tokens(IDS, max_new_tokens=np.int64(2)))) == 2


def test_one_text_is_not_many_prompts(toy):
    with toy.session() as session, pytest.raises(UsageError, match="in a list"):
        session.generate_many(PROMPT)
