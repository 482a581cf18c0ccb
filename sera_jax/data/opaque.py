"""Whether a chat template writes contents as they are, whatever they say: read from its source, so that no conversation
need be rendered to know how it is cut.

A template that only copies (and strips) contents, and decides by roles and places alone, writes the same pieces around
any contents of the same roles. Whatever is not plainly of that kind is not taken for it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import jinja2
from jinja2 import nodes


class _Kind(enum.Enum):
    """What an expression holds: the messages, one of them, text with a content in it, or nothing of a content."""

    MESSAGES = 1
    MESSAGE = 2
    TEXT = 3
    OTHER = 4


_MESSAGES, _MESSAGE, _TEXT, _OTHER = _Kind
_STRIPS = ("strip", "lstrip", "rstrip")
_SAME_OF_ALL_TEXTS = ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence")  # tests
_NO_MATTER = (nodes.Const, nodes.TemplateData)
_OF_PARTS = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.And, nodes.Or, nodes.Not,
             nodes.Neg, nodes.Pos, nodes.Sub, nodes.Mul, nodes.Mod, nodes.Div, nodes.FloorDiv)  # fmt: skip


class _Looks(Exception):
    """The template may look at a content."""


def copies_contents(source: str) -> bool:
    """Whether what a template writes around contents is decided by roles and places alone; False where in doubt."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        reader = _Reader()
        before: dict[str, _Kind] = {}
        while True:  # names that are set after they are used, in a loop
            reader.statements(tree.body)
            if reader.names == before:
                return True
            before = dict(reader.names)
    except (_Looks, jinja2.TemplateError):
        return False


class _Reader:
    """Walks a template; `names`: what each name holds, wherever it stands."""

    def __init__(self) -> None:
        self.names: dict[str, _Kind] = {"messages": _MESSAGES}
        self._in_macro = False

    def statements(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            allowed = (_OTHER,) if self._in_macro else (_OTHER, _TEXT)
            if any(self.kind(part) not in allowed for part in node.nodes):
                raise _Looks
        elif isinstance(node, nodes.For):
            over = self.kind(node.iter)
            if over in (_MESSAGE, _TEXT) or node.recursive or (over is _MESSAGES and node.test):
                raise _Looks
            self._set(node.target, _MESSAGE if over is _MESSAGES else _OTHER)
            self._plain([node.test] if node.test else [])
            self.statements([*node.body, *node.else_])
        elif isinstance(node, nodes.If):
            self._plain([node.test])
            self.statements([*node.body, *node.elif_, *node.else_])
        elif isinstance(node, nodes.Assign):
            self._set(node.target, self.kind(node.node))
        elif isinstance(node, nodes.Macro):
            self._in_macro = True
            self._plain(node.defaults)
            for name in node.args:
                self._set(name, _OTHER)
            self.statements(node.body)
            self._in_macro = False
        elif isinstance(node, nodes.ExprStmt):
            self._plain([node.node])
        elif not isinstance(node, nodes.Break | nodes.Continue):
            raise _Looks

    def kind(self, node: nodes.Node) -> _Kind:
        if isinstance(node, _NO_MATTER):
            return _OTHER
        if isinstance(node, nodes.Name):
            return self.names.get(node.name, _OTHER)
        if isinstance(node, nodes.Getitem | nodes.Getattr):
            return self._part(node)
        if isinstance(node, nodes.Add):
            return self._text_of([node.left, node.right])
        if isinstance(node, nodes.Concat):
            return self._text_of(node.nodes)
        if isinstance(node, nodes.CondExpr):
            self._plain([node.test])
            return self._text_of([node.expr1, *([node.expr2] if node.expr2 else [])])
        if isinstance(node, nodes.Filter) and node.node is not None:
            return self._filtered(node, self.kind(node.node))
        if isinstance(node, nodes.Call):
            return self._called(node)
        if isinstance(node, nodes.Test):
            if node.name not in _SAME_OF_ALL_TEXTS:
                self._plain([node.node])
            else:
                self.kind(node.node)
            self._plain(node.args)
            return _OTHER
        if isinstance(node, nodes.Compare):
            return self._compared(node)
        if isinstance(node, _OF_PARTS):
            self._plain(node.iter_child_nodes())
            return _OTHER
        raise _Looks

    def _part(self, node: nodes.Getitem | nodes.Getattr) -> _Kind:
        of = self.kind(node.node)
        if isinstance(node, nodes.Getattr):
            beside = isinstance(node.node, nodes.Name) and node.node.name == "loop"
            if beside and node.attr in ("previtem", "nextitem"):
                return _MESSAGE
            name: object = node.attr
        elif isinstance(node.arg, nodes.Slice):
            self._plain(node.arg.iter_child_nodes())
            name = None
        else:
            self._plain([node.arg])
            name = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if of is _MESSAGES and isinstance(node, nodes.Getitem) and not isinstance(name, str):
            return _MESSAGES if isinstance(node.arg, nodes.Slice) else _MESSAGE
        if of is _MESSAGE and isinstance(name, str) and not hasattr(dict, name):  # which gives all that is in it
            return _TEXT if name == "content" else _OTHER
        if of is _OTHER:
            return _OTHER
        raise _Looks

    def _filtered(self, node: nodes.Filter, of: _Kind) -> _Kind:
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if of is _TEXT and node.name == "trim" and bare:
            return _TEXT
        if of is _MESSAGES and node.name in ("length", "count") and bare:
            return _OTHER
        self._plain(node.iter_child_nodes())
        return _OTHER

    def _called(self, node: nodes.Call) -> _Kind:
        bare = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        method = node.node
        if isinstance(method, nodes.Getattr) and method.attr in _STRIPS and bare and self.kind(method.node) is _TEXT:
            return _TEXT
        self._plain(node.iter_child_nodes())
        return _OTHER

    def _compared(self, node: nodes.Compare) -> _Kind:
        (first, *others) = node.ops
        key_of_message = first.op in ("in", "notin") and not others and isinstance(node.expr, nodes.Const)
        if not (key_of_message and self.kind(first.expr) is _MESSAGE):
            self._plain([node.expr, *(op.expr for op in node.ops)])
        return _OTHER

    def _text_of(self, parts: Iterable[nodes.Node]) -> _Kind:
        kinds = {self.kind(part) for part in parts}
        if kinds - {_TEXT, _OTHER}:
            raise _Looks
        return _TEXT if _TEXT in kinds else _OTHER

    def _plain(self, parts: Iterable[nodes.Node]) -> None:
        if any(self.kind(part) is not _OTHER for part in parts):
            raise _Looks

    def _set(self, target: nodes.Node, kind: _Kind) -> None:
        if not isinstance(target, nodes.Name):
            if kind is not _OTHER:
                raise _Looks
            for part in target.find_all(nodes.Name):
                self._set(part, kind)
            return
        known = self.names.get(target.name, kind)
        if {known, kind} == {_TEXT, _OTHER}:
            kind = _TEXT
        elif known is not kind:
            raise _Looks
        self.names[target.name] = kind
