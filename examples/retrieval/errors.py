"""The one kind of error that is the user's to mend."""


class InputError(Exception):
    """What is wrong with what was given, and what to do about it."""


def reason(error: BaseException) -> str:
    """What an error of another library's says, in a line."""
    lines = str(error).splitlines()
    said = lines[0][:200] if lines else ""
    return said if " " in said else f"{type(error).__name__} {said}".strip()
