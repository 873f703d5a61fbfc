"""The jinja2 environment that chat templates are written for: what transformers gives them, in a sandbox.

A template is foreign code that runs in the router, so what one rendering may do is bounded. Knows filters, functions
and tags; knows nothing of messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_STEPS = 1_000_000  # turns of loops and calls of macros in one rendering: about a second
_MOST_REPEATED = 10_000_000  # characters or items that one * makes
_MOST_BITS = 10_000  # of a product or a power


class TooMuchWork(Exception):
    """A rendering that would not end, or not soon."""


class BoundedTemplate:
    """A template whose renderings end. A text that is doubled in each of a few turns can still fill the memory."""

    def __init__(self, source: str) -> None:
        """Raises whatever jinja2 and Python say of a source that they cannot compile."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, _Steps, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        steps = environment.extensions[_Steps.identifier]
        assert isinstance(steps, _Steps), "made from this class above"
        self._steps = steps
        self._template = environment.from_string(steps.counted(environment.parse(source)))

    def render(self, variables: Mapping[str, object]) -> str:
        """The text. Raises TooMuchWork, and whatever else the template does."""
        self._steps.num_left = _MOST_STEPS
        return self._template.render(variables)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})  # jinja2 would compute them of constants when it compiles, too

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As in Python, up to a size."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            is_bounded = bits <= _MOST_BITS
        else:
            pairs = ((left, right), (right, left))
            products = [len(items) * times for items, times in pairs if _has_length(items) and isinstance(times, int)]
            is_bounded = max(products, default=0) <= _MOST_REPEATED
        if not is_bounded:
            raise TooMuchWork(f"the result of one {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _has_length(value: object) -> bool:
    return isinstance(value, str | bytes | list | tuple)


class _Steps(Extension):
    """Counts the turns of loops, those that a loop's condition leaves out too, and the calls of macros."""

    num_left = 0

    def counted(self, tree: nodes.Template) -> nodes.Template:
        """The template, with a call of `_step` wherever something is repeated."""
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For),
            *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock),
        ]
        for node in repeated:
            node.body.insert(0, nodes.ExprStmt(self.call_method("_step")))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(self.call_method("_step"), node.test)
            node.set_lineno(node.lineno)
        tree.set_environment(self.environment)
        return tree

    def _step(self) -> bool:
        self.num_left -= 1
        if self.num_left < 0:
            raise TooMuchWork(f"more than {_MOST_STEPS} turns of its loops")
        return True


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # an instance's attribute in jinja2's class

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block, as in transformers: what the body sets is not seen outside of it."""
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line_number)

    def _body(self, caller: Macro) -> str:
        return str(caller())


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own, without escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
