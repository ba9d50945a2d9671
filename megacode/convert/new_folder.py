"""A folder that appears when it is whole."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megacode.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into.

    It becomes `out` at the end, and is removed where something fails.

    Raises:
        UserError: it cannot be made, written to or given its name.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Libraries raise an OSError of their own, without a number.
        if isinstance(error, OSError) and error.errno:
            raise UserError(
                f"{out}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        raise
