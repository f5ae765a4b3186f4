"""The one kind of error that a user can correct: it names the place, the field, what was found, and the remedy."""

from __future__ import annotations

import re


class UserError(Exception):
    """Input that cannot be used as it is.

    where:  the file, option or catalog entry at fault.
    field:  the part of it (a column, a gene, a key).
    found:  what is there.
    remedy: what the user can do about it.
    """

    def __init__(self, where: object, field: str, found: str, remedy: str) -> None:
        self.where = str(where)
        self.field = field
        self.found = found
        self.remedy = remedy
        # All four go to Exception, so that the error survives pickling between processes.
        super().__init__(self.where, field, found, remedy)

    def __str__(self) -> str:
        return f"{self.where}\n  field:  {self.field}\n  found:  {self.found}\n  remedy: {self.remedy}"


def shown(names: list[str], most: int = 5) -> str:
    """Return the first few names for a message, and how many more there are: `a, b, c and 4 more`.

    Parameters
    ----------
    names : list[str]
        In the order in which they are shown.
    most : int
        At most so many.

    Returns
    -------
    str
    """
    head = ", ".join(names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most} more"


def cut_middle(text: str, most: int) -> str:
    """Return the text with its middle left out where it is long: the beginning names the place, the end the remedy.

    Parameters
    ----------
    text : str
        Any text, also one without spaces.
    most : int
        How many characters of it are kept.

    Returns
    -------
    str
    """
    return text if len(text) <= most else f"{text[: most // 2].rstrip()} … {text[-(most // 2) :].lstrip()}"


def hide_password(text: str) -> str:
    """Return the text with what an address has before its last `@`, a user name and password, replaced by dots.

    A password may contain `/` and `@`: of an address whose path has an `@`, the host is hidden too.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
    """
    return re.sub(r"//\S*@", "//...@", text)
