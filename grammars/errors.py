"""What can be wrong with a grammar."""


class GrammarError(Exception):
    """A grammar cannot be compiled, or is more than is allowed; the message says why."""
