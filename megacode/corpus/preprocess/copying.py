"""Copying between files without taking the bytes through this process."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def copy_range(source: Path, start: int, out: int, offset: int, size: int) -> None:
    """Copy `size` bytes of a file, from `start` on, to a place in an open one.

    In the kernel where it can (some file systems then share the blocks). OSError if the source ends too early.
    """
    with open(source, "rb", buffering=0) as file:
        done = 0
        try:
            while done < size and hasattr(os, "copy_file_range"):
                copied = os.copy_file_range(
                    file.fileno(), out, size - done, start + done, offset + done
                )
                if not copied:
                    break
                done += copied
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        while done < size:
            chunk = os.pread(file.fileno(), min(1 << 17, size - done), start + done)
            if not chunk:
                raise OSError(f"{source}: ends {size - done} bytes too early")
            done += os.pwrite(out, chunk, offset + done)
