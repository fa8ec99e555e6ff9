"""What a user can cause and can put right: the command prints one line and ends with code 2."""


class UserError(Exception):
    """The message is one line for a person, with no traceback."""


def describe(error):
    """The text of an OSError without its number: "No space left on device: runs/x/loss.png"."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{text}: {error.filename}" if error.filename else text
