"""The one kind of error that is the user's to mend."""


class InputError(Exception):
    """What is wrong with what was given, and what to do about it."""


def reason(error: BaseException) -> str:
    """What an error of another library's says, in a line."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
