"""Chat templates: Jinja from a checkpoint that nobody vouches for, in a sandbox.

What a template may use is what `transformers` gives it: `messages`, `tools`, `documents`,
`add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`, `strftime_now`, `tojson`,
`break` and `continue`, and `{% generation %}` blocks. The sandbox lets it reach no attribute that
starts with an underscore, no code object, no module; it cannot change what it is given.
`text.bounds` keeps it from running away.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from edge_mmllm.errors import TemplateError
from edge_mmllm.text import bounds

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24

#: Filters that can make a huge value of a small one and that no chat template needs.
_DROPPED_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")


class _Raised(Exception):
    """`raise_exception(message)` in a template."""


class ChatTemplate:
    """A compiled chat template. Thread-safe.

    Raises:
        TemplateError: the source is not a template, or is too large.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                "the chat template is too large",
                expected=f"at most {MAX_SOURCE_CHARS} characters",
                found=f"{len(source)} characters",
            )
        self._lock = threading.Lock()
        self._environment: Any = _environment_class()()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            raise _translate(error) from error

    def render(self, variables: dict[str, Any]) -> str:
        """The template's text.

        Raises:
            TemplateError: it failed, refused its input, tried to leave the sandbox or would not
                end. Nothing outside the sandbox was run.
        """
        pieces: list[str] = []
        size = 0
        with self._lock:
            self._environment.budget = bounds.Budget()
            try:
                for piece in self._template.generate(variables):
                    size += len(piece)
                    if size > MAX_OUTPUT_CHARS:
                        raise bounds.TooMuch(f"more than {MAX_OUTPUT_CHARS} characters of output")
                    pieces.append(piece)
            except Exception as error:
                raise _translate(error) from error
        return "".join(pieces)


def _translate(error: Exception) -> TemplateError:
    """The `TemplateError` for whatever a template's compilation or run raised."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    if isinstance(error, _Raised):
        return TemplateError("the chat template refused these messages", found=str(error))
    if isinstance(error, SecurityError):
        return TemplateError(
            "the chat template tried to leave its sandbox; nothing was run outside",
            found=str(error),
            fix="do not use this checkpoint's template: pass another, or a plain prompt",
        )
    if isinstance(error, (bounds.TooMuch, OverflowError, MemoryError, RecursionError)):
        return TemplateError(
            "the chat template takes too much time or memory",
            found=str(error) or type(error).__name__,
        )
    where = f"line {error.lineno}" if isinstance(error, TemplateSyntaxError) else None
    return TemplateError(
        "the chat template failed", where=where, found=f"{type(error).__name__}: {error}"
    )


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    bounds.check_percent(form)
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it: Jinja's own `tojson` would escape HTML."""
    if indent is not None and not 0 <= indent <= 64:
        raise bounds.TooMuch(f"an indent of {indent}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _bounded_filters(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Jinja's filters of the same names, bounded and without their seldom used arguments."""
    plain_format, plain_indent = filters["format"], filters["indent"]

    def form(value: object, *arguments: Any) -> Any:
        bounds.check_percent(str(value))
        return plain_format(str(value), *arguments)

    def indent(value: str, width: int = 4, first: bool = False, blank: bool = False) -> Any:
        bounds.check_items(len(value) + (value.count("\n") + 1) * min(width, bounds.MAX_WIDTH))
        bounds.check_width(width)
        return plain_indent(value, width, first, blank)

    def join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = [value[attribute] for value in values]
        return bounds.join(map(str, values), str(d))

    def replace(value: object, old: str, new: str, count: int = -1) -> str:
        bounds.check_replace(str(value), old, new)
        return str(value).replace(old, new, count)

    return {"format": form, "indent": indent, "join": join, "replace": replace, "tojson": _tojson}


@cache
def _environment_class() -> type[ImmutableSandboxedEnvironment]:
    """The environment's class. Made on first use: importing Jinja takes a while."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks training text; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Bounded(CodeGenerator):
        """Adds a step to every loop, and compiles `~` to a bounded join."""

        def visit_For(self, node: nodes.For, frame: Frame) -> None:
            step = nodes.EnvironmentAttribute("step")
            node.body.insert(0, nodes.ExprStmt(nodes.Call(step, [], [], None, None)))
            if node.test is not None:
                node.test = nodes.And(nodes.Call(step, [], [], None, None), node.test)
            node.set_environment(self.environment)
            super().visit_For(node, frame)

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.write("environment.join_values((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, bounded."""

        code_generator_class = Bounded
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(bounds.join)  # joins the text of a block, a macro or a call

        def __init__(self) -> None:
            # As transformers configures it. optimized=False: nothing is run at compile time.
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                optimized=False,
                extensions=[LoopControlExtension, Generation],
            )
            self.budget = bounds.Budget()
            for name in _DROPPED_FILTERS:
                del self.filters[name]
            del self.globals["lipsum"]
            self.filters.update(_bounded_filters(self.filters))
            self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

        def step(self) -> bool:
            """See `bounds.Budget.step`."""
            return self.budget.step()

        def join_values(self, parts: Iterable[object]) -> str:
            """`a ~ b`."""
            return bounds.join(map(str, parts))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            bounds.check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            if __obj == __self.step:
                return __self.step()
            # Not only loops: macros that call each other twice need 2**n steps.
            __self.step()
            return super().call(__context, __obj, *bounds.check_call(__obj, args), **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                bounds.check_braces(value.__self__)
            return wrapped

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja's own would print as nothing. A template that tries this is not to be trusted.
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    return Environment
