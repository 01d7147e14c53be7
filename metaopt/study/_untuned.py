"""The control that every method has to beat."""

from ._method import AbstractMethod


class Untuned(AbstractMethod):
    """The settings as they were given, which cost nothing: a control."""

    def check(self, task, trace):
        """Nothing to check."""

    def run(self, task, trace):
        """Nothing to do: a trace begins at the settings that were given."""
