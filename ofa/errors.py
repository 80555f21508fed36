"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake the user can mend: the message states the rule, the value and the remedy, in one line."""


def said(error: BaseException) -> str:
    """What an error of a library says, in one line, cut where it is long."""
    return " ".join(str(error).split())[:200]
