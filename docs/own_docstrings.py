"""An extension of griffe: an attribute has no docstring but its own.

Objects are inspected, and Python answers with the docstring of the class where an instance
has none: that of `bool` for a class attribute that is `False`.
"""

import inspect

import griffe


class OwnDocstrings(griffe.Extension):
    def on_attribute_instance(self, *, node, attr, agent, **_) -> None:
        if not isinstance(node, griffe.ObjectNode) or attr.docstring is None:
            return
        if inspect.getdoc(node.obj) == inspect.getdoc(type(node.obj)):
            attr.docstring = None
