"""Errors that are messages to the user. An exception of any other class, but for OSError, is a bug."""


class UserError(Exception):
    """Its text says in one line what is wrong and what to do."""

    exit_code = 1  # of the command line


class InputError(UserError, ValueError):
    """An option, a file or a text that cannot be used."""
