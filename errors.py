"""The errors a user can meet: one line saying what is wrong, where, and what to do about it."""


class SafetyExpertsError(Exception):
    """The work failed (command line exit code 1). The message is one line: what, where, remedy."""


class InputError(SafetyExpertsError):
    """The arguments or an input file are wrong (command line exit code 2)."""
