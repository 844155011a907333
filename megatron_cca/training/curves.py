"""The TensorBoard events of a run."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """TensorBoard events in a folder. If somebody removes the folder, a new one is begun.

    Args:
        folder: is created.
        first_step: TensorBoard drops what an interrupted run wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def renewed(self, step: int) -> bool:
        """Begin a new folder if the old one was removed. Return whether it was.

        Raises:
            OSError: the folder cannot be created.
        """
        if self._folder.is_dir():
            return False
        former, self.writer = self.writer, SummaryWriter(str(self._folder), purge_step=step)
        former.close()
        return True

    def close(self) -> None:
        """Write the remaining events. Raise OSError if they cannot be written."""
        self.writer.close()
