"""The one exception that tells a user, in a sentence, what to change."""


class UserError(ValueError):
    """An argument, file or setting cannot be used; the message is one sentence that names it.

    The command line prints the sentence without a traceback; in a program it is an ordinary ``ValueError``.
    """


class NotWritten(UserError):
    """A file that the disk did not take, or that must not be written any more."""
