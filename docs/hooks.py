"""A hook of mkdocs: cleans up what it shows of classes without `__init__` docstring."""

# Python's text for every `__init__` that has none of its own. Equinox writes the
# `__init__` of modules, so nearly every class here would end with it.
_EMPTY_INIT = "<p>Initialize self.  See help(type(self)) for accurate signature.</p>"


def on_page_content(html: str, **_) -> str:
    return html.replace(_EMPTY_INIT, "")
