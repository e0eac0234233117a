"""Lock a folder, so that one process at a time works in it."""

import fcntl
from pathlib import Path
from typing import IO

from loguru import logger


class FolderLock:
    """A lock on a folder, which ends with the process, however that ends."""

    def __init__(self) -> None:
        self._file: IO | None = None

    @property
    def held(self) -> bool:
        """Whether this process has the folder."""
        return self._file is not None

    def take(self, folder: Path) -> bool:
        """Lock a folder; if the file system has no locks, warn and continue.

        :return: whether no other process holds the lock
        """
        self._file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:  # network file systems may have no locks
            logger.warning(
                f"{folder} cannot be locked ({error.strerror}); make sure that no "
                "other process works there"
            )
        return True

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
