"""Inserts charges into a chat template for operations that Jinja's sandbox has no method for."""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from dbrx_fn.text.template_meter import CALL, NODE, STEP, TemplateBoundsError

SPEND, READ, GO_OVER, COUNTED = "its spend", "its read", "its go over", "its counted"
"""Names of the inserted filters. No template can spell them itself."""


class Charging(NodeTransformer):
    """Inserts charges into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Charges each round of a loop for its body. With a test that skips rounds, each is charged on its own."""
        cost = STEP + sum(map(_cost, [*node.body, node.target]))
        self.generic_visit(node)
        node.body.insert(0, _statement(cost))
        if node.test is not None:
            node.iter = _through(node.iter, COUNTED)
        return node

    def _charge_body(self, node: Any) -> Any:
        """Charges a call of a macro or block for its body."""
        cost = CALL + sum(map(_cost, [*node.body, *getattr(node, "args", ()), *getattr(node, "defaults", ())]))
        self.generic_visit(node)
        node.body.insert(0, _statement(cost))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _charge_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Charges concatenation for reading its parts."""
        self.generic_visit(node)
        node.nodes = [_read_through(part) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Charges a comparison for reading both sides, unless one side is a constant of the template."""
        self.generic_visit(node)
        operand = node.ops[0]
        if any(other.op in ("in", "notin") for other in node.ops):
            if len(node.ops) > 1:
                raise TemplateBoundsError("it chains 'in' with another comparison")
            found = nodes.Test(node.expr, "in", [operand.expr], [], None, None).set_lineno(node.lineno)
            return found if operand.op == "in" else nodes.Not(found).set_lineno(node.lineno)
        if len(node.ops) > 1 or not (_is_constant(node.expr) or _is_constant(operand.expr)):
            node.expr = _read_through(node.expr)
            for other in node.ops:
                other.expr = _read_through(other.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Charges a slice as a copy."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through(node.node, GO_OVER)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Charges for hashing keys."""
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _read_through(pair.key)
        return node


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _through(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _read_through(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _through(node, READ)


def _statement(cost: int) -> nodes.Node:
    return nodes.ExprStmt(_through(nodes.Const(cost, lineno=1), SPEND), lineno=1)


def _cost(node: nodes.Node) -> int:
    """Units for running a part of a template once, without bodies that are charged on their own."""
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
    own = ("body",) if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) else ()
    inner = sum(map(_cost, node.iter_child_nodes(exclude=own)))
    return NODE + inner + (len(text) if isinstance(text, str) else 0)
