"""Answers that keep to a JSON schema, a grammar, a regular expression or a list of choices.

llguidance (an extra, imported when a constraint is first used) says after each token which ones
may follow; all others are kept from the sampler. It works on bytes, over a table of each token's
bytes that we make ourselves (`edge_mmllm.text.vocabulary`), so that every engine and every
tokenizer is constrained in the same way. See docs/constrained.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import MissingDependency, SessionError, UsageError
from edge_mmllm_runtime.engine import Float32

if TYPE_CHECKING:
    from edge_mmllm.text.vocabulary import Vocabulary

Kind = Literal["json_schema", "grammar", "regex", "choices"]

#: How JSON is written, unless the schema's own `x-guidance` says otherwise: as `json.dumps` does.
#: Free white space is left out, since a small model may write it without an end.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

#: An escape of GBNF: llguidance's way from GBNF to Lark does not know characters by number.
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)

#: Longest grammar or schema; what llguidance makes of it has limits of its own.
MAX_SOURCE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like.

    Attributes:
        kind: in which language `source` says it.
        source: JSON for `json_schema` and `choices`; llguidance's Lark, or GBNF, for `grammar`.
    """

    kind: Kind
    source: str

    @classmethod
    def of(
        cls,
        json_schema: Mapping[str, Any] | str | None = None,
        grammar: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Constraint | None:
        """The one constraint that is given; None where none is.

        Args:
            json_schema: as a mapping, or as JSON text.
            grammar: llguidance's Lark (it has a rule `start`), or llama.cpp's GBNF (`root ::=`).
            regex: of the whole answer, in the syntax of Rust's `regex`.
            choices: the answers there are.

        Raises:
            UsageError: more than one, or of a wrong type.
        """
        every = (json_schema, grammar, regex, choices)
        if sum(value is not None for value in every) > 1:
            raise UsageError(
                "an answer has one constraint",
                expected="one of json_schema, grammar, regex, choices",
                found=f"{sum(value is not None for value in every)} of them",
            )
        if json_schema is not None:
            return cls("json_schema", _schema(json_schema))
        if choices is not None:
            if isinstance(choices, str) or not all(isinstance(c, str) and c for c in choices):
                raise UsageError("choices are a list of texts", found=repr(choices)[:200])
            if not choices:
                raise UsageError("there is nothing to choose from", found="choices=[]")
            return cls("choices", json.dumps(list(choices)))
        if grammar is not None:
            return cls("grammar", _checked("grammar", grammar))
        if regex is not None:
            return cls("regex", _checked("regex", regex))
        return None


def _checked(kind: Kind, text: object) -> str:
    """Raises: UsageError: no text, or too much of it."""
    if not isinstance(text, str) or len(text) > MAX_SOURCE_CHARACTERS:
        raise UsageError(
            f"{kind} must be text of at most {MAX_SOURCE_CHARACTERS} characters",
            found=type(text).__name__ if not isinstance(text, str) else str(len(text)),
        )
    return text


def _schema(given: Mapping[str, Any] | str) -> str:
    """A schema as JSON. Raises: UsageError."""
    try:
        value = json.loads(given) if isinstance(given, str) else dict(given)
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("the JSON schema is no JSON", found=str(error)[:200]) from error
    if not isinstance(value, dict) or len(text) > MAX_SOURCE_CHARACTERS:
        raise UsageError(
            "a JSON schema is an object",
            expected=f"a mapping of at most {MAX_SOURCE_CHARACTERS} characters as JSON",
            found=text[:80],
        )
    return text


@dataclass
class ConstraintCost:
    """What a constraint cost one answer.

    Attributes:
        compile_ms: to make the grammar, and once a session the table of tokens; 0 where both
            were there.
        tokens: generated under it.
        forced: of these, how many the grammar left no choice about: neither sampled nor, but for
            the last of a run, read one by one.
        mask_ms: spent on finding which tokens may follow, altogether.
    """

    compile_ms: float = 0.0
    tokens: int = 0
    forced: int = 0
    mask_ms: float = 0.0

    @property
    def mask_us_per_token(self) -> float:
        """Microseconds for each token."""
        return 1e3 * self.mask_ms / self.tokens if self.tokens else 0.0


class Guides:
    """Makes the guides of one model: keeps its table of tokens, and the last guides made.

    Args:
        vocabulary: makes the table; called once, when the first guide is asked for.
        encode: text to ids, for what is forced.
        size: number of logits.
        eos_ids: what ends an answer.
    """

    _KEPT = 8

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        encode: Callable[[str], Sequence[int]],
        size: int,
        eos_ids: Sequence[int],
    ) -> None:
        self._vocabulary, self._encode = vocabulary, encode
        self._size, self._eos = size, [i for i in eos_ids if i < size]
        self._tokenizer: Any = None
        self._made: dict[Constraint, Guide] = {}

    def guide(self, constraint: Constraint) -> Guide:
        """A guide for the constraint.

        Raises:
            MissingDependency: llguidance is not installed.
            UsageError: the constraint is malformed, has no solution or asks for what llguidance
                does not know; the message has its words.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise MissingDependency("llguidance", "constrained")
        known = self._made.pop(constraint, None)
        if known is None:
            started = time.perf_counter()
            if self._tokenizer is None:
                self._tokenizer = self._table()
            matcher = _compiled(constraint, self._tokenizer)
            taken_ms = 1e3 * (time.perf_counter() - started)
            known = Guide(matcher, self._size, self._tokenizer.vocab_size, taken_ms)
        self._made[constraint] = known
        if len(self._made) > self._KEPT:
            del self._made[next(iter(self._made))]
        return known

    def _table(self) -> Any:
        """llguidance's form of the vocabulary."""
        import llguidance

        vocabulary = self._vocabulary()
        tokens, special = list(vocabulary.tokens), set(vocabulary.special) | set(self._eos)
        eos = list(self._eos)
        if not eos:  # the answer ends where the grammar does: an id that no logits have
            eos = [len(tokens)]
            tokens.append(b"<end>")
            special.add(eos[0])
        wrapper = llguidance.TokenizerWrapper(_Tokens(tokens, special, eos[0], self._encode))
        return llguidance.LLTokenizer(wrapper, eos_token=eos)


class _Tokens:
    """A vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(
        self,
        tokens: list[bytes],
        special: set[int],
        eos: int,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self.tokens, self.eos_token_id, self._text = tokens, eos, encode
        self.special_token_ids = sorted(special)
        self._special = special
        # For the greedy way: id of each text, and the longest.
        self._ids = {t: i for i, t in enumerate(tokens) if t and i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, data: bytes | str) -> list[int]:
        """Ids whose bytes are `data`: the tokenizer's own, unless it adds or changes bytes (a
        space in front, a special token's name)."""
        data = data.encode("utf-8") if isinstance(data, str) else data
        try:
            ids = list(self._text(data.decode("utf-8")))
        except (UnicodeDecodeError, UsageError):
            return self._greedy(data)
        plain = all(i < len(self.tokens) and i not in self._special for i in ids)
        if plain and b"".join(self.tokens[i] for i in ids) == data:
            return ids
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """At each place the longest token that fits; up to where none does."""
        ids, at = list[int](), 0
        while at < len(data):
            lengths = range(min(self._longest, len(data) - at), 0, -1)
            found = next((n for n in lengths if data[at : at + n] in self._ids), 0)
            if not found:
                break
            ids.append(self._ids[data[at : at + found]])
            at += found
        return ids


def _compiled(constraint: Constraint, tokenizer: Any) -> Any:
    """A matcher at its beginning. Raises: UsageError."""
    from llguidance import LLMatcher, grammar_from

    what = constraint.kind.replace("_", " ").replace("json", "JSON")
    try:
        if constraint.kind == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(constraint.source, defaults=_JSON)
        elif constraint.kind == "choices":
            # Each text as a string of Lark, in which JSON's escapes mean what they mean here.
            grammar = grammar_from("choice", json.loads(constraint.source))
        elif constraint.kind == "grammar":
            grammar = grammar_from("grammar", _ESCAPE.sub(_as_itself, constraint.source))
        else:
            grammar = grammar_from(constraint.kind, constraint.source)
        wrong, said = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    except (ValueError, RecursionError) as error:
        wrong, said = True, [str(error)]
    if wrong:
        raise UsageError(
            f"the {what} cannot be used", found=" ".join(said)[:500], fix="see docs/constrained.md"
        )
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise UsageError(f"the {what} cannot be used", found=_words(matcher))
    return matcher


def _as_itself(escape: re.Match[str]) -> str:
    """A character that was written by its number, where it means nothing to a grammar."""
    code = escape[1] or escape[2] or escape[3]
    if code is None or (number := int(code, 16)) > 0x10FFFF:
        return escape[0]
    character = chr(number)
    if character.isprintable() and character not in '"\\[]^-/':
        return character
    return f"\\x{number:02x}" if number < 0x80 else escape[0]


def _words(matcher: Any) -> str:
    """What llguidance says is wrong, without its state."""
    return str(matcher.get_error()).partition("\n<state>")[0][:500]


class Guide:
    """A constraint for one model's vocabulary, at one place of an answer. It does not change.

    Attributes:
        compile_ms: what it took to make.
    """

    def __init__(self, matcher: Any, size: int, ids: int, compile_ms: float) -> None:
        self._matcher, self._size, self._ids, self.compile_ms = matcher, size, ids, compile_ms
        self._used = False

    def after(self, ids: Sequence[int]) -> Guide:
        """The same constraint for an answer that began with `ids`: to go on from a snapshot
        taken in the middle.

        Raises:
            UsageError: an answer cannot begin with them.
        """
        matcher = self._matcher.deep_copy()
        good = matcher.validate_tokens(list(ids))
        if good < len(ids) or not matcher.consume_tokens(list(ids)):
            raise UsageError(
                "no answer under this constraint begins with these tokens",
                found=f"{ids[good] if good < len(ids) else '?'} at {good}",
            )
        return Guide(matcher, self._size, self._ids, 0.0)

    @property
    def may_end(self) -> bool:
        """Whether what there is of the answer is a whole one."""
        return bool(self._matcher.is_accepting())

    def start(self) -> Matching:
        """For one answer."""
        cost = ConstraintCost(0.0 if self._used else self.compile_ms)
        self._used = True
        return Matching(self._matcher.deep_copy(), self._size, self._ids, cost)


class Matching:
    """Where one answer stands in its grammar.

    Args:
        matcher: llguidance's.
        size: number of logits.
        ids: in llguidance's table: one more where the model has no end-of-sequence token.

    Attributes:
        cost: so far.
    """

    def __init__(self, matcher: Any, size: int, ids: int, cost: ConstraintCost) -> None:
        self._matcher, self._size, self.cost = matcher, size, cost
        self._bits = np.zeros((ids + 31) // 32, np.uint32)  # the lowest id in the lowest bit
        self._address, self._bytes = self._bits.ctypes.data, self._bits.nbytes

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: Float32) -> Float32 | None:
        """Logits `(vocab,)`, with minus infinity for what may not follow; None where nothing but
        the end may, and the model has no token for it.

        Raises:
            SessionError: the grammar became too complex.
        """
        started = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._address, self._bytes)
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little")
        allowed: NDArray[np.bool_] = bits.view(np.bool_)
        if not allowed.any():
            if self._matcher.is_accepting():
                return None
            self._fail()
        result: Float32 = np.where(allowed, logits, np.float32(-np.inf))
        self.cost.mask_ms += 1e3 * (time.perf_counter() - started)
        return result

    def accept(self, token: int) -> list[int]:
        """Notes a token of `masked`; the tokens that must follow it.

        Raises:
            SessionError: see `masked`.
        """
        started = time.perf_counter()
        if not self._matcher.consume_token(token):
            self._fail()
        forced = self.forced()
        self.cost.mask_ms += 1e3 * (time.perf_counter() - started)
        return forced

    def forced(self) -> list[int]:
        """Tokens that must follow, noted as if they had been taken."""
        if self._matcher.is_stopped():
            return []
        ids: list[int] = self._matcher.compute_ff_tokens()
        if ids and not self._matcher.consume_tokens(ids):
            self._fail()
        return ids

    def _fail(self) -> None:
        said = _words(self._matcher) if self._matcher.is_error() else "no token may follow"
        raise SessionError(
            "the constraint cannot be followed any further",
            found=said,
            fix="a simpler grammar: fewer alternatives that begin alike, smaller repetitions",
        )
