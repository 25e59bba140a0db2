"""Errors that are messages to the user. An exception of any other class, but for OSError, is a bug."""

import sys


class UserError(Exception):
    """Its text says in one line what is wrong and what to do."""

    exit_code = 1  # of the command line


class InputError(UserError, ValueError):
    """A file or a text that cannot be used, or a setting."""


class UsageError(InputError):
    """A setting's value that cannot be used; settings are named as on the command line."""

    exit_code = 2


def installs(extra: str) -> str:
    """The command that adds an extra of pyproject.toml, whether this is a checkout or a wheel."""
    return f"{sys.executable} -m pip install 'fusedgpt[{extra}]'"
