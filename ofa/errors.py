"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake the user can mend: the message states the rule, the value and the remedy, in one line."""
