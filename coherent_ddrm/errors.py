"""What a user can do wrong. Each message is one line: the value, the rule it breaks, the way out.

Both are ValueErrors, so library code may catch them as such; the command line turns them into exit code 2. A plain
ValueError or TypeError stays a programming error and keeps its traceback there.
"""


class UserError(ValueError):
    """An argument or an input cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another make, or holds weights that are not numbers."""
