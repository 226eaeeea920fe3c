"""The session: one model, one context, whatever the engine underneath.

with edge_mmllm.load("smollm2.int4") as session:
    for piece in session.generate("Once upon a time", max_new_tokens=50):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from edge_mmllm.errors import UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime import generation
from edge_mmllm_runtime.context import CHUNK, Context
from edge_mmllm_runtime.engine import Engine, Int64
from edge_mmllm_runtime.generation import FinishReason, Prompt
from edge_mmllm_runtime.placing import Media
from edge_mmllm_runtime.prefixes import cache_prompt, sharing
from edge_mmllm_runtime.prompted import Prompted
from edge_mmllm_runtime.reading import Progress
from edge_mmllm_runtime.sampling import Sampling
from edge_mmllm_runtime.storage import Storage

if TYPE_CHECKING:
    from edge_mmllm.text import Text
    from edge_mmllm_runtime.constrained import Constraint, ConstraintCost, Guide, Guides


class Session(Context):
    """A context that reads and writes text.

    Args:
        engine, spec, bundle_sha256, context, chunk, read_file: see `Context`.
        make_text: makes the tokenizer on first use; None: token ids only.

    Attributes:
        finish_reason: why the last generation ended; None before its end.
        constraint_cost: what the last generation's constraint cost; None without one.
    """

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        bundle_sha256: str,
        make_text: Callable[[], Text] | None = None,
        *,
        context: int | None = None,
        chunk: int = CHUNK,
        read_file: Callable[[str], bytes] | None = None,
    ) -> None:
        super().__init__(
            engine, spec, bundle_sha256, context=context, chunk=chunk, read_file=read_file
        )
        self._make_text = make_text
        self._text: Text | None = None
        self._guides: Guides | None = None
        self.finish_reason: FinishReason | None = None
        self.constraint_cost: ConstraintCost | None = None

    @property
    def text(self) -> Text:
        """The bundle's `edge_mmllm.text.Text`.

        Raises:
            UsageError: the bundle has no tokenizer.
        """
        if self._text is None:
            if self._make_text is None or self.spec.text.tokenizer == "none":
                raise UsageError(
                    "the bundle has no tokenizer",
                    fix="give token ids, or export again with --tokenizer PATH",
                )
            self._text = self._make_text()
        return self._text

    def generate(
        self,
        prompt_or_messages: Prompt,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        *,
        videos: Sequence[Any] | None = None,
        reuse: bool = False,
        progress: Progress | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        grammar: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Iterator[str]:
        """Answers with text, piece by piece.

        Arguments are checked now; the prompt is read when the first piece is asked for. See
        `sampling.py` for the order in which the sampling settings apply.

        Args:
            prompt_or_messages: text; chat messages (`{"role": ..., "content": ...}`), which go
                through the bundle's chat template; token ids; or None to go on from the state,
                after `prefill`, `decode` or `restore`.
            images, audio, videos: for multimodal bundles, in the order of their places in the
                prompt: a text's placeholders (`<image>`), or the parts `{"type": "image"}` of
                messages (which may bring their own, `{"type": "image", "image": ...}`). A text
                without placeholders is asked as a user's message, with them before it. A picture
                is a path, bytes, a file, a Pillow picture or a uint8 array. What was encoded is
                kept by content, see `perception`.
            max_new_tokens: ends the answer at the latest. It ends earlier at any of the
                model's end-of-sequence tokens, at a stop string or where the context is full:
                see `finish_reason`.
            stop: strings that end the answer and are not part of it.
            reuse: False starts from an empty context. True keeps what the state already has of
                the prompt, as a chat wants it: the longest common beginning where every state
                can be cut (attention); all of the state, or nothing, where it is constant
                (recurrent). The logits may differ from a fresh start by rounding.
            progress: see `prefill`.
            json_schema, grammar, regex, choices: one of them, which the answer keeps to, see
                `Constraint.of` and docs/constrained.md. An answer that `max_new_tokens`, a stop
                string or the context cut off is only the beginning of one that does.

        Yields:
            Pieces of text: whole characters, never a part of a stop string.

        Raises:
            UsageError, ContextFull: nothing was changed.
            MissingDependency: a constraint without the extra `constrained`.
        """
        media = {"image": images, "audio": audio, "video": videos}
        given = {name: items for name, items in media.items() if items is not None}
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        constraint: Constraint | None = None
        if any(value is not None for value in (json_schema, grammar, regex, choices)):
            from edge_mmllm_runtime.constrained import Constraint

            constraint = Constraint.of(json_schema, grammar, regex, choices)
        return self._generate(
            prompt_or_messages, max_new_tokens, sampling, stop, reuse, progress, given, constraint
        )

    def generate_tokens(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        *,
        ignore_eos: bool = False,
        reuse: bool = False,
        progress: Progress | None = None,
        media: Media | None = None,
        constraint: Constraint | Guide | None = None,
    ) -> Iterator[int]:
        """As `generate`, but yields token ids; an end-of-sequence token is not yielded.

        Args:
            prompt, max_new_tokens, reuse, progress: see `generate`.
            sampling: None for greedy.
            ignore_eos: go on after an end-of-sequence token (and yield it), as benchmarks with
                a fixed number of tokens need.
            media: modality (`image`, ...) -> what belongs into the prompt, see `generate`. Token
                ids have a placeholder's id for each item, or for each of its rows.
            constraint: what the answer keeps to; a `Guide` to go on in the middle of one.

        Raises:
            UsageError, ContextFull: nothing was changed.
            MissingDependency: see `generate`.
        """
        if constraint is not None and ignore_eos:
            raise UsageError("a constrained answer ends as its constraint says", found="ignore_eos")
        return generation.tokens(
            self,
            prompt,
            max_new_tokens,
            sampling or Sampling(),
            stop_ids=frozenset() if ignore_eos else frozenset(self.spec.text.eos_ids),
            reuse=reuse,
            progress=progress,
            media=media,
            guide=None if constraint is None else self.guide(constraint),
        )

    def guide(self, constraint: Constraint | Guide) -> Guide:
        """A constraint made ready for this model's vocabulary; the last eight made are kept.

        Raises:
            UsageError: the constraint cannot be used, or the bundle has no tokenizer.
            MissingDependency: llguidance is not installed.
        """
        from edge_mmllm_runtime.constrained import Constraint, Guides

        if not isinstance(constraint, Constraint):
            return constraint
        if self._guides is None:
            text, size = self.text, self.spec.vocab_size
            self._guides = Guides(
                lambda: text.vocabulary(size),
                lambda part: text.encode(part, add_bos=False),
                size,
                self.spec.text.eos_ids,
            )
        return self._guides.guide(constraint)

    def encode(self, prompt: Prompt | Int64, media: Media | None = None) -> Prompted:
        """A prompt as `prefill` takes it, with pictures in their places.

        Raises:
            UsageError: see `generate`; no prompt.
        """
        made = generation.encode_prompt(self, cast("Prompt", prompt), media)
        if made is None:
            raise UsageError("there is no prompt", expected="text, messages or token ids")
        return made

    def release(self, stage: str) -> bool:
        """Gives the memory of a stage back, e.g. `encode_image`, until it is used again.

        Returns:
            Whether it was loaded.

        Raises:
            UsageError: the bundle has no such stage, or cannot run without it.
        """
        return self.perception.release(stage)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        *,
        constraint: Constraint | None = None,
    ) -> list[str]:
        """Answers each prompt from an empty context, one after the other.

        All prompts are checked before the first is read. Nothing is padded: with a seed, each
        answer is the one that `generate` gives with that seed. A beginning that all prompts
        share is read once, where it is long enough to pay and fits into `prompt_cache` beside
        what is there.

        Raises:
            UsageError, ContextFull: nothing was changed.
        """
        if isinstance(prompts, str):  # its characters would be the prompts
            raise UsageError("prompts come in a list", found=repr(prompts)[:80])
        ids = [generation.encode_prompt(self, p) for p in prompts]
        streams = [
            self._generate(p, max_new_tokens, sampling, stop, constraint=constraint) for p in ids
        ]
        with sharing(self, ids):
            return ["".join(stream) for stream in streams]

    def cache_prompt(self, prompt: Prompt, storage: Storage = "f32") -> int:
        """Reads a prompt and keeps the state after it in `prompt_cache`.

        From then on every `generate` from an empty context, and every `prefill` into one, whose
        prompt begins with the same tokens restores that state instead of reading them. The
        session's own state is that of the cached tokens afterwards.

        Args:
            prompt: text or chat messages, which other prompts begin with (what their last
                tokens may become once more follows is left out); or token ids, kept whole.
            storage: see `snapshot`; what follows a state in `f16` or `int8` drifts.

        Returns:
            Tokens cached; 0: the prompt shares no token with a longer one, nothing was done.

        Raises:
            UsageError: no such prompt; a state larger than `prompt_cache.limit_bytes`.
            ContextFull: nothing was changed.
        """
        return cache_prompt(self, prompt, storage)

    def _generate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling | None,
        stop: str | Sequence[str],
        reuse: bool = False,
        progress: Progress | None = None,
        media: Media | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[str]:
        from edge_mmllm.text import StopMatcher

        matcher = StopMatcher(stop)
        _ = self.text
        ids = self.generate_tokens(
            prompt, max_new_tokens, sampling, reuse=reuse, progress=progress, media=media,
            constraint=constraint,
        )  # fmt: skip
        return generation.pieces(self, ids, matcher)
