"""TensorBoard's events of a run."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """TensorBoard's events in a folder. Where the folder is gone, it is begun anew.

    Args:
        folder: is made.
        first_step: TensorBoard forgets what an interrupted run wrote from there on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def renewed(self, step: int) -> bool:
        """Begin anew if the folder is gone; returns whether it was.

        Raises:
            OSError: the folder cannot be made.
        """
        if self._folder.is_dir():
            return False
        former, self.writer = self.writer, SummaryWriter(str(self._folder), purge_step=step)
        former.close()
        return True

    def close(self) -> None:
        """Write what is left; raises OSError where that is refused."""
        self.writer.close()
