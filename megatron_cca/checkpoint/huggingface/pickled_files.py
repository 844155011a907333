"""Folders of weights that ``torch.save`` wrote. They are read as memory maps, and without running what they hold."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_cca.checkpoint.huggingface.safetensors_files import SafetensorsFolder, has_dtype
from megatron_cca.checkpoint.huggingface.weights_folder import TensorInfo, WeightsFolder
from megatron_cca.errors import UserError, error_context
from megatron_cca.models.weight_files import tensors_in


class PickledFolder(WeightsFolder):
    """See :class:`WeightsFolder`. Files that torch before 1.6 wrote are in memory while they are read."""

    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def __init__(self, folder: Path, option: str) -> None:
        # One file is open at a time. Its pages are the system's to drop.
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        super().__init__(folder, option)

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        tensor = self._tensors(info.file)[info.name].detach()
        return tensor[start:stop] if info.shape else tensor

    def _scan_file(self, path: Path) -> dict[str, TensorInfo]:
        found = {}
        for name, tensor in self._tensors(path).items():
            if not has_dtype(tensor.dtype):
                raise UserError(f"{self.option}: tensor {name} in {path} has dtype {tensor.dtype}, which is not known")
            found[name] = TensorInfo(path, name, tuple(tensor.shape), tensor.dtype)
        return found

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != path:
            self._open = None
            with error_context(f"{self.option}: {path}"):
                self._open = path, tensors_in(path, ())
        return self._open[1]


def open_weights(folder: Path, option: str) -> WeightsFolder:
    """Return the weights in a folder: its safetensors, or what ``torch.save`` wrote if it has none.

    Raises:
        UserError: see :class:`WeightsFolder`.
    """
    is_pickled = PickledFolder.is_in(folder) and not SafetensorsFolder.is_in(folder)
    return (PickledFolder if is_pickled else SafetensorsFolder)(folder, option)
