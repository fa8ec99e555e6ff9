"""Files that are complete or absent, whatever happens while they are written."""

import os
from pathlib import Path

from .errors import UserError


def write_atomically(path, data):
    """Replaces path by the bytes, through a temporary file beside it, fsync and rename.

    Raises:
        UserError: the disk is full, or any other OSError; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def sync_folder(folder):
    """The rename itself survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
