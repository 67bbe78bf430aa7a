"""Renders chat templates in a sandbox that bounds their steps, time, output and memory.

A template comes with a checkpoint, so it may be anybody's program. transformers' own environment has the filters and
functions that templates use, and keeps them from Python's objects; it sets no bounds. Here the same filters and
functions run in an environment that counts: each pass of a loop and each call is a step, and each text or list that an
expression makes is counted before it is made, where its size could be a multiple of what goes in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from typing import TYPE_CHECKING, Any

from jinja2 import Template, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hermes_async.errors import RequestError
from hermes_async.modeling.chat_api import template_environment
from hermes_async.serving.template_limits import MAX_TEMPLATE_CHARS, Budget

if TYPE_CHECKING:
    from jinja2.environment import Environment

_MAX_TEMPLATES = 16
"""Compiled ones that are kept. A checkpoint has one, or a few."""

_current = threading.local()


def render_template(source: Any, variables: Mapping[str, Any]) -> str:
    """What a template makes of some variables.

    Raises:
        RequestError: The template takes more steps, time or memory than allowed, or is too long.
        jinja2.TemplateError: It is not valid, or refuses the variables. Or another error of an expression.
    """
    if not isinstance(source, str):
        raise RequestError(f"the checkpoint's chat template is a {type(source).__name__}, not a text")
    if len(source) > MAX_TEMPLATE_CHARS:
        raise RequestError(
            f"the checkpoint's chat template has {len(source)} characters, more than the {MAX_TEMPLATE_CHARS} allowed"
        )
    with _bounded(Budget(variables)):
        return _compiled(source).render(variables)


@contextmanager
def _bounded(budget: Budget) -> Iterator[None]:
    _current.budget = budget
    try:
        yield
    finally:
        _current.budget = None


def _budget() -> Budget:
    budget: Budget = _current.budget
    return budget


@lru_cache(maxsize=_MAX_TEMPLATES)
def _compiled(source: str) -> Template:
    environment = _environment()
    tree = _Counting().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None), None
    )


@cache
def _environment() -> _BoundedEnvironment:
    return _BoundedEnvironment(template_environment())


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with the counting of a `Budget`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, base: Environment) -> None:
        super().__init__(
            trim_blocks=base.trim_blocks,
            lstrip_blocks=base.lstrip_blocks,
            extensions=[type(extension) for extension in base.extensions.values()],
            finalize=_output,
            optimized=False,  # the optimizer computes constants without a budget
        )
        self.filters = {name: _counted(name, function) for name, function in base.filters.items()}
        self.tests = base.tests
        self.globals = {name: value for name, value in base.globals.items() if name != "lipsum"}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget().before_operator(operator, left, right)
        value = super().call_binop(context, operator, left, right)
        _budget().size_of(value)  # remembers the size of a list
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        args = budget.before_call(function, args, kwargs)
        return budget.made(super().call(context, function, *args, **kwargs))

    # --- what `_Counting` puts into templates ---

    def passed(self, num_chars: int) -> None:
        """Called in each pass of a loop or a macro, with the characters of its constant texts."""
        _budget().text(num_chars)  # `call` has counted the step

    def joined(self, *parts: Any) -> str:
        """The operator `~`."""
        budget = _budget()
        budget.text(sum(map(budget.size_of, parts)))
        return "".join(map(str, parts))

    def made(self, value: Any) -> Any:
        """A list, tuple, dict or slice that the template has written; `call` has counted it."""
        return value


@pass_context  # else constants are computed when the template is compiled
def _output(context: Context, value: Any) -> Any:
    budget = _budget()
    budget.text(budget.size_of(value))
    return value


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, with its result and what it makes of its arguments counted."""
    first = int(getattr(function, "jinja_pass_arg", None) is not None)

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        value = budget.before_filter(name, args[first], args[first + 1 :], kwargs)
        return budget.made(function(*args[:first], value, *args[first + 1 :], **kwargs))

    return counted


class _Counting(NodeTransformer):
    """Puts calls of the environment's counting functions into a template."""

    def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        node = super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For() | nodes.Macro() | nodes.CallBlock() | nodes.Block():
                num_chars = sum(len(text.data) for part in node.body for text in _texts(part))
                passed = _call("passed", nodes.Const(num_chars, lineno=node.lineno))
                node.body.insert(0, nodes.ExprStmt(passed, lineno=node.lineno))
            case nodes.Concat():
                return _call("joined", *node.nodes)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _call("made", node)
        return node


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of a function of the environment."""
    lineno = args[0].lineno if args else 1
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=lineno), list(args), [], None, None, lineno=lineno)


def _texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    return iter([node]) if isinstance(node, nodes.TemplateData) else node.find_all(nodes.TemplateData)
