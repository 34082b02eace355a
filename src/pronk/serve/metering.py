# ruff: noqa: N802, N815  (the visitor finds its methods by the names of Jinja's nodes)
"""Where a template is charged: at each turn of a loop, and where a literal or slice is made."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.environment import Environment
from jinja2.visitor import NodeTransformer

__all__ = ["Metering"]


class Metering(NodeTransformer):
    """Puts calls of an environment's ``tick``, ``weighed`` and ``tilde`` into a template's tree.

    They are attributes of the environment, which no variable of a template can replace.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def _call(self, name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
        target = nodes.EnvironmentAttribute(name)
        call = nodes.Call(target, args, [], None, None)
        call.set_lineno(line)
        call.set_environment(self._environment)
        return call

    def _with_tick(self, node: Any) -> Any:
        texts = (data.data for data in node.find_all(nodes.TemplateData))
        size = sum(map(len, texts))
        tick = nodes.ExprStmt(self._call("tick", [nodes.Const(size)], node.lineno))
        tick.set_lineno(node.lineno)
        self.generic_visit(node)
        node.body.insert(0, tick)
        return node

    visit_For = _with_tick
    visit_Macro = _with_tick
    visit_CallBlock = _with_tick
    visit_Block = _with_tick
    visit_FilterBlock = _with_tick
    visit_AssignBlock = _with_tick

    def _weighed(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node  # the target of an assignment
        return self._call("weighed", [node], node.lineno)

    visit_List = _weighed
    visit_Tuple = _weighed
    visit_Dict = _weighed

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        # Only slices make something new.
        if isinstance(node.arg, nodes.Slice):
            return self._call("weighed", [node], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._call("tilde", node.nodes, node.lineno)
