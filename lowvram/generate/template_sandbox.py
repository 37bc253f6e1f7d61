"""A Jinja environment for chat templates, in a sandbox that limits their work; knows no message.

It has transformers' settings and tags.  jinja2's own sandbox protects Python's internals from a template, but not the
machine's time and memory: here every loop, call, operator and output is counted by a Budget.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowvram.generate.template_budget import Budget
from lowvram.generate.template_operations import (
    CHECKED_OPERATORS,
    BudgetedContext,
    BudgetedFormatter,
    FormatMethod,
    ShortNamespace,
    check_method,
    filters,
    raise_exception,
    show_value,
    strftime_now,
    tests,
)

# Arguments that jinja2's code adds to every call inside loops and blocks.
_GIVEN_BY_JINJA = {"_loop_vars", "_block_vars"}


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks an assistant's text for training; rendering ignores the tags."""

    tags = {"generation"}  # noqa: RUF012 (the base class's type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BudgetedCode(CodeGenerator):
    """Adds calls of the Budget to the Python code into which jinja2 compiles a template."""

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        """Count the template's own text; `finalize` counts what is computed."""
        fixed = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if fixed:
            self.writeline(f"context.budget.take({fixed})")
        super().visit_Output(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Count every iteration, also those that the loop's condition skips."""
        node.body = [nodes.ExprStmt(nodes.ContextReference()), *node.body]
        if node.test is not None:
            node.test = nodes.And(nodes.ContextReference(), node.test)
        super().visit_For(node, frame)

    def visit_ContextReference(self, node: nodes.ContextReference, frame: Frame) -> None:
        """Write the call that counts a step and returns True; no tag of chat templates makes such a node itself."""
        self.write("context.step()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Count the operands of `~` before they are joined."""
        self.write("(markup_join if context.eval_ctx.autoescape else str_join)(context.budget.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Count what a comparison reads, unless one side is a constant: that costs no more than a step."""
        last = node.ops[-1]
        is_bounded = len(node.ops) == 1 and (
            _is_constant(last.expr, frame) or (last.op in ("eq", "ne") and _is_constant(node.expr, frame))
        )
        visit = self.visit if is_bounded else self._visit_read
        self.write("(")
        visit(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            visit(operand.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Count the copy that a slice makes, and the key where it is computed."""
        if isinstance(node.arg, nodes.Slice):
            self.write("context.budget.new(")
            super().visit_Getitem(node, frame)
            self.write(")")
        elif _is_constant(node.arg, frame):
            super().visit_Getitem(node, frame)
        else:
            self.write("environment.getitem(")
            self.visit(node.node, frame)
            self.write(", ")
            self._visit_read(node.arg, frame)
            self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """Count a list that holds computed values."""
        self._visit_container(node, frame, super().visit_List)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """Count a tuple that holds computed values, unless it is the target of an assignment."""
        if node.ctx == "store":
            super().visit_Tuple(node, frame)
        else:
            self._visit_container(node, frame, super().visit_Tuple)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Count a dictionary that holds computed values."""
        self._visit_container(node, frame, super().visit_Dict)

    def _visit_container(self, node: nodes.Expr, frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        if _is_constant(node, frame):
            visit(node, frame)
            return
        self.write("context.budget.new(")
        visit(node, frame)
        self.write(")")

    def _visit_read(self, node: nodes.Expr, frame: Frame) -> None:
        self.write("context.budget.read(")
        self.visit(node, frame)
        self.write(")")


def _is_constant(node: nodes.Expr, frame: Frame) -> bool:
    try:
        node.as_const(frame.eval_ctx)
    except (nodes.Impossible, TypeError):  # TypeError: a list as a key, which raises again when the template runs
        return False
    return True


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment whose templates are rendered by `render`, within a budget."""

    code_generator_class = _BudgetedCode
    context_class = BudgetedContext
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=show_value
        )
        self.filters = filters()
        self.tests |= tests()
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": ShortNamespace}

    def render(self, template: Template, values: dict[str, Any], budget: Budget) -> str:
        """Return the text of a template of this environment; raises BudgetError, and the errors that Jinja raises."""
        context = template.new_context(values)
        assert isinstance(context, BudgetedContext)
        context.budget = budget
        return "".join(template.root_render_func(context))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, after checking how large the result will be."""
        assert isinstance(context, BudgetedContext)
        budget = context.budget
        if operator == "+" and type(left) is type(right) is str:  # the most frequent operation of most templates
            joined: str = left + right
            budget.take(len(joined))
            return joined
        if operator in CHECKED_OPERATORS:
            CHECKED_OPERATORS[operator](budget, left, right)
        return budget.new(self.binop_table[operator](left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """Return a stand-in for the method format of a string, which only `call` can call."""
        if not isinstance(value, types.MethodType | types.BuiltinMethodType):
            return None
        if value.__name__ not in ("format", "format_map") or not isinstance(value.__self__, str):
            return None
        return FormatMethod(value.__self__, value.__name__ == "format_map")

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for a template, after checking how large the result will be."""
        assert isinstance(context, BudgetedContext)
        budget = context.budget
        budget.step(1 + len(args) + len(kwargs))
        if isinstance(called, types.BuiltinMethodType | types.MethodType):
            args = check_method(budget, called.__self__, called.__name__, args)
        if isinstance(called, FormatMethod):
            given = {name: value for name, value in kwargs.items() if name not in _GIVEN_BY_JINJA}
            return budget.new(BudgetedFormatter(self, budget).format_text(called, args, given))
        return budget.new(super().call(context, called, *args, **kwargs))
