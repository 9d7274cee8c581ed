"""The one error that stands for a mistake of the user or of the machine, not of this code."""


class UserError(ValueError):
    """An error the user can fix: its sentence names the value, what was expected and the fix.

    The command line prints that sentence alone. Every other exception is a bug and keeps its traceback.
    """
