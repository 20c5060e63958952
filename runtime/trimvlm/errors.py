"""The one exception class whose message is meant for the user as it stands."""


class UserError(ValueError):
    """Bad input of the user's: the message names the value, what is allowed and the next step.

    The command line prints it on one line and exits with 2. Programmer errors stay `assert`s.
    """
