"""The one exception that launch scripts turn into a message and exit code 2."""


class UserError(ValueError):
    """A mistake that the person who started the program can mend.

    The message is one line: the file or field, the rule, the value, and the way out.
    """
