"""The prompt cache: what is restored instead of read, and that nobody can tell from the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys

from edge_mmllm.errors import Cancelled, ContextFull, SessionError, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text
from edge_mmllm_runtime.prefixes import stable_ids
from edge_mmllm_runtime.prompt_cache import PromptCache
from edge_mmllm_runtime.sampling import Sampling

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "tiny-mamba2"
RNG = np.random.default_rng(7)
IDS = RNG.integers(0, toys.VOCAB, 100).tolist()
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "You are a kind and patient helper."}


@pytest.fixture(params=["recurrent", "attention"])
def toy(request, tmp_path):
    return getattr(toys, request.param)(tmp_path)


def watch(session):
    """The lengths of the engine's prefill chunks from now on."""
    chunks, forward = [], session.engine.forward
    session.engine.forward = lambda c, p, r: chunks.append(len(c)) or forward(c, p, r)
    return chunks


def fresh(toy, prompt, count=12, **changes):
    with replace(
        toy, spec=replace(toy.spec, text=replace(toy.spec.text, **changes))
    ).session() as s:
        return list(s.generate_tokens(prompt, count))


def test_the_longest_cached_beginning_is_restored(toy):
    with toy.session(chunk=16) as session:
        assert session.cache_prompt(IDS[:30]) == session.position == 30
        assert session.cache_prompt(IDS[:60]) == 60
        session.cache_prompt([*IDS[:40], 1, 2])
        chunks = watch(session)
        assert list(session.generate_tokens(IDS, 12)) == fresh(toy, IDS)
        assert chunks == [16, 16, 8]
        assert session.tokens[:100] == tuple(IDS)
        chunks.clear()
        other = [*IDS[:35], 3, 4]
        assert list(session.generate_tokens(other, 12)) == fresh(toy, other)
        assert sum(chunks) == 7
        chunks.clear()
        assert list(session.generate_tokens(IDS[1:], 12)) == fresh(toy, IDS[1:])
        assert sum(chunks) == 99


def test_building_on_what_is_cached(toy):
    with toy.session() as session:
        session.cache_prompt(IDS[:50])
        chunks = watch(session)
        session.cache_prompt(IDS[:80])
        assert sum(chunks) == 30


def test_a_whole_cached_prompt_is_not_read_at_all(toy):
    with toy.session() as session:
        session.cache_prompt(IDS)
        expected = session.logits.copy()
        chunks = watch(session)
        for _ in range(2):
            assert list(session.generate_tokens(IDS, 12)) == fresh(toy, IDS)
        session.reset()
        found = session.prefill(IDS)
        assert np.array_equal(found, expected)
        found[:] = 0  # the caller's own
        assert np.array_equal(session.logits, expected)
        session.reset()
        assert np.array_equal(session.prefill(IDS), expected)
        assert chunks == []


def test_prefill_takes_it_into_an_empty_context_only(toy):
    with toy.session() as session:
        session.cache_prompt(IDS[:40])
        chunks = watch(session)
        session.prefill(IDS[:50])
        assert chunks == [50]
        session.reset()
        chunks.clear()
        assert len(session.prefill(IDS[:50], logits="all")) == 50
        assert chunks == [50]
        session.reset()
        chunks.clear()
        seen = []
        session.chunk = 16
        session.prefill(IDS, positions=range(100), progress=lambda *a: seen.append(a))
        assert chunks == [16, 16, 16, 12]
        assert seen == [(40, 100), (56, 100), (72, 100), (88, 100)]
        assert np.abs(session.logits - toy.reference(np.array(IDS))[-1]).max() < 1e-3


def test_reuse_takes_what_is_longer(toy):
    with toy.session() as session:
        session.cache_prompt(IDS[:60])
        session.reset()
        session.prefill(IDS[:20])
        chunks = watch(session)
        assert list(session.generate_tokens(IDS, 5, reuse=True)) == fresh(toy, IDS, 5)
        assert sum(chunks) == 40
        chunks.clear()
        longer = [*session.tokens, 5, 6]
        assert list(session.generate_tokens(longer, 5, reuse=True)) == fresh(toy, longer, 5)
        assert sum(chunks) == 2


@pytest.mark.parametrize("error", [Cancelled("enough"), SessionError("broken")])
def test_a_prefill_that_fails_after_a_restore_is_undone(toy, error):
    def progress(done, total):
        raise error

    with toy.session(chunk=16) as session:
        session.cache_prompt(IDS[:30])
        session.reset()
        with pytest.raises(type(error)):
            session.prefill(IDS, progress=progress)
        assert (session.position, session.tokens) == (0, ())
        forward = session.engine.forward
        session.engine.forward = lambda *a: progress(0, 0)
        with pytest.raises(type(error)):
            session.prefill(IDS[:33])
        assert (session.position, session.tokens) == (0, ())
        session.engine.forward = forward
        session.prompt_cache.clear()
        found = session.prefill(IDS, logits="all")
        assert np.abs(found - toy.reference(np.array(IDS))).max() < 1e-3


def test_the_least_recently_used_goes_first(toy):
    with toy.session() as session:
        cache = session.prompt_cache
        prompts = [[i] * 20 for i in range(4)]
        session.cache_prompt(prompts[0])
        one = cache.size_bytes
        assert one == session.snapshot().memory_bytes + 80
        cache.limit_bytes = 3 * one
        session.cache_prompt(prompts[1])
        session.cache_prompt(prompts[2])
        list(session.generate_tokens([*prompts[0], 9], 1))  # a use
        session.cache_prompt(prompts[3])
        assert [p in cache for p in prompts] == [True, False, True, True]
        session.cache_prompt(prompts[3])
        assert (len(cache), cache.size_bytes) == (3, 3 * one)
        cache.discard(prompts[0])
        assert cache.size_bytes == 2 * one
        cache.limit_bytes = one - 1
        chunks = watch(session)
        with pytest.raises(UsageError, match="larger than the prompt cache"):
            session.cache_prompt([7] * 20)
        assert chunks == []
        assert len(cache) == 2
        cache.clear()
        assert (len(cache), cache.size_bytes) == (0, 0)


def test_it_works_in_small_storage(toy):
    with toy.session() as session:
        session.cache_prompt(IDS[:60], "int8")
        small = session.prompt_cache.size_bytes
        session.cache_prompt(IDS[:60])
        assert session.prompt_cache.size_bytes > small
        session.prompt_cache.clear()
        session.cache_prompt(IDS[:60], "f16")
        chunks = watch(session)
        session.reset()
        found = session.prefill(IDS)
        assert sum(chunks) == 40
        expected = toy.reference(np.array(IDS))[-1]
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
        with pytest.raises(UsageError):
            session.cache_prompt(IDS, "int4")


def test_what_cannot_be_cached(toy):
    with toy.session() as session:
        session.prefill(IDS[:3])
        version = session.version
        for bad in (None, [], [300], "", {"role": "user", "content": "x"}):
            if bad == "":
                assert session.cache_prompt(bad) == 0
                continue
            with pytest.raises(UsageError):
                session.cache_prompt(bad)
        if session.context is not None:
            with pytest.raises(ContextFull):
                session.cache_prompt("x" * (session.context + 100))
        assert session.version == version
        assert PromptCache().longest(np.array(IDS)) is None


# -- text: where tokens may change at the seam --------------------------------------------------


def bpe():
    """A byte-pair tokenizer that merges across words' ends: `to`+`day`, line ends, digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]
    merges = [("t", "o"), ("d", "a"), ("da", "y"), ("to", "day"), ("\u010a", "\u010a"),
              ("\u0120", "a"), ("1", "2"), ("\u0120", "\u0120")]  # fmt: skip
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


@pytest.fixture
def with_bpe(toy):
    def session():
        made = toy.session()
        made._make_text = lambda: Text(TextSpec("tokenizers", chat_template=CHATML), bpe())
        return made

    return session


@pytest.mark.parametrize(
    ("prefix", "rest"),
    [
        ("say it to", "day, please"),
        ("say it to", " a friend"),
        ("line\n", "\nnext line"),
        ("call 1", "234"),
        ("two ", " spaces"),
        ("say it to", ""),
    ],
)
def test_a_text_is_cached_up_to_where_tokens_may_change(with_bpe, prefix, rest):
    with with_bpe() as session:
        expected = list(session.generate_tokens(prefix + rest, 12))
        whole = session.text.encode(prefix + rest)
        count = session.cache_prompt(prefix)
        assert 3 <= count <= len(whole)
        assert session.tokens == tuple(whole[:count])
        chunks = watch(session)
        assert list(session.generate_tokens(prefix + rest, 12)) == expected
        assert sum(chunks) == len(whole) - count


def test_the_seam_matters_with_this_tokenizer():
    """Guards the test above: the naive prefix is not one of the whole."""
    text = Text(TextSpec("tokenizers"), bpe())
    naive = text.encode("say it to")
    assert text.encode("say it today")[: len(naive)] != naive
    assert stable_ids(text, "say it to") == text.encode("say it")
    assert stable_ids(text, "say it \n") == text.encode("say it")
    assert stable_ids(text, "to") == stable_ids(text, "") == []
    assert stable_ids(text, "x" * 100) == text.encode("x" * 68)


def test_ids_are_stable_under_the_example_model_s_tokenizer():
    """A real byte-pair vocabulary, cut anywhere: what is cached is a beginning of the whole."""
    text = Text(TextSpec("tokenizers"), (EXAMPLE / "tokenizer.json").read_bytes())
    whole = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    ids = text.encode(whole)
    naive = 0
    for cut in range(1, len(whole)):
        found = stable_ids(text, whole[:cut])
        assert found == ids[: len(found)], whole[:cut][-20:]
        assert len(found) >= len(text.encode(whole[:cut])) - 32
        plain = text.encode(whole[:cut])
        naive += plain != ids[: len(plain)]
    assert naive > len(whole) / 4


@pytest.mark.parametrize("asked", [[], [{"role": "user", "content": "Hi"}]])
def test_messages_are_cached_up_to_the_next_turn(with_bpe, asked):
    turns = [SYSTEM, *asked]
    longer = [*turns, *([{"role": "assistant", "content": "Yes?"}] if asked else [])]
    longer.append({"role": "user", "content": "today"})
    with with_bpe() as session:
        expected = list(session.generate_tokens(longer, 12))
        prompt = list(session.tokens[: len(session.text.encode_chat(longer))])
        count = session.cache_prompt(turns)
        begin = "".join(f"<{t['role']}>{t['content']}\n" for t in turns)
        assert count >= len(session.text.encode(begin)) - 2
        chunks = watch(session)
        assert list(session.generate_tokens(longer, 12)) == expected
        assert sum(chunks) == len(prompt) - count


def test_a_template_that_wants_a_question_first(with_bpe):
    """`raise_exception` unless the last turn is the user's."""
    strict = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    with with_bpe() as session:
        session._make_text = lambda: Text(TextSpec("tokenizers", chat_template=strict), bpe())
        count = session.cache_prompt([SYSTEM])
        chunks = watch(session)
        question = [SYSTEM, {"role": "user", "content": "Who?"}]
        list(session.generate_tokens(question, 1))
        assert sum(chunks) == len(session.text.encode_chat(question)) - count < 40


# -- many prompts -------------------------------------------------------------------------------

SHARED = "A long enough beginning that all of them share. "
MANY = [SHARED + "One.", SHARED, SHARED + "Another, and rather longer one!", SHARED + "One more."]


def test_each_of_many_equals_a_fresh_run(toy):
    """Lengths differ by 100 tokens; no padding may show."""
    prompts = ["a", [1, 2, 3], "x" * 100, MANY[0], "a"]
    expected = [text_of(toy, p) for p in prompts]
    with toy.session(chunk=16) as session:
        assert session.generate_many(prompts, max_new_tokens=12) == expected
        assert len(session.prompt_cache) == 0


def text_of(toy, prompt, **options):
    with toy.session(chunk=16) as session:
        return "".join(session.generate(prompt, max_new_tokens=12, **options))


def test_many_read_their_common_beginning_once(toy):
    sampling = Sampling(temperature=1.5, seed=3)
    with toy.session(chunk=16) as session:
        session.cache_prompt(IDS[:30])
        kept = session.prompt_cache.size_bytes
        chunks = watch(session)
        found = session.generate_many(MANY, 12, sampling)
        assert found == [text_of(toy, p, temperature=1.5, seed=3) for p in MANY]
        assert sum(chunks) == len(SHARED) + sum(len(p) - len(SHARED) for p in MANY)
        assert session.prompt_cache.size_bytes == kept
        assert IDS[:30] in session.prompt_cache


@pytest.mark.parametrize("change", ["short", "no room", "one", "cached"])
def test_many_share_only_where_it_pays(toy, change):
    prompts = {"short": ["same one", "same two"], "one": MANY[:1]}.get(change, MANY)
    with toy.session() as session:
        if change == "no room":
            session.prompt_cache.limit_bytes = 10
        if change == "cached":
            session.cache_prompt(list(SHARED.encode()))
        chunks = watch(session)
        assert session.generate_many(prompts, 12) == [text_of(toy, p) for p in prompts]
        if change == "cached":
            assert sum(chunks) == sum(len(p) - len(SHARED) for p in prompts)
            assert len(session.prompt_cache) == 1
        else:
            assert sum(chunks) == sum(map(len, prompts))


def test_many_with_a_broken_one_change_nothing(toy):
    with toy.session() as session:
        session.prefill(IDS[:3])
        version = session.version
        with pytest.raises(UsageError):
            session.generate_many([*MANY, [300]])
        assert session.version == version
        assert len(session.prompt_cache) == 0
