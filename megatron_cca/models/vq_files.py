"""Read the files of image tokenizers that have VQGAN's network: tensors by name, in what ``torch.save`` writes.

Sizes are read from the shapes of tensors. Every message has the file's own names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cca.errors import UserError
from megatron_cca.models.formats import float32_copy
from megatron_cca.models.vq_network import NORM_GROUPS, VqNetwork, VqSizes
from megatron_cca.models.weight_files import contents_of, tensors_under

CODEBOOK = "quantize.embedding.weight"
_FIRST = "encoder.conv_in.weight"
# In the order of LlamaGen's sampling and code extraction. "ema" is a training checkpoint's average.
_SECTIONS = ("model", "ema", "state_dict")
# VAR's trainer saves the image tokenizer beside the model that it trains.
_TRAINER, _OF_TRAINER = "trainer", "vae_local"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SUFFIXES = (".pt", ".pth")
# From the network's names to those of VQGAN's authors (CompVis/taming-transformers), applied one after the other.
_VQGAN_NAMES = (
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"\.res\.", ".block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)
_DECODER_LEVEL = re.compile(r"^decoder\.conv_blocks\.(\d+)\.")


@dataclass(frozen=True)
class VqForm:
    """What the files of one family look like.

    Attributes:
        owner: whose they are, for messages ("LlamaGen's").
        example: the name of a released file.
        own_prefix: how names begin that no other family's files have.
        decoder: a tensor that only files of the family's decoder have.
        unused: tensors that only training uses.
        quant_kernel: see :class:`VqNetwork`.
        file_name: returns a tensor's name in the file for its name in the network and the number of levels. Tensors of
            the network that have one name there are one tensor there, in the network's order.
        quantizer_shapes: returns names and shapes of the tensors beside the network's, for its sizes.
    """

    owner: str
    example: str
    own_prefix: str
    decoder: str
    unused: tuple[str, ...]
    quant_kernel: int
    file_name: Callable[[str, int], str]
    quantizer_shapes: Callable[[VqSizes], dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class VqContents:
    """What one file holds.

    Attributes:
        form: of the file.
        sizes: of the network.
        tensors: float32 copies by the file's names.
        unused: the tensors that only training uses, as they are in the file.
    """

    form: VqForm
    sizes: VqSizes
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor]

    def network(self) -> VqNetwork:
        """Return the network with the file's tensors."""
        network = _on_meta(self.form, self.sizes)
        state = {}
        for stored, names in _names_in_file(self.form, self.sizes, network).items():
            state |= zip(names, self.tensors[stored].chunk(len(names)), strict=True)
        network.load_state_dict(state, assign=True)
        return network


class VqFiles:
    """What :class:`megatron_cca.models.formats.ImageTokenizerFiles` of these families have in common."""

    form: VqForm

    def recognises(self, path: Path) -> bool:
        """See the protocol."""
        return bool(_files(path))

    def knows(self, path: Path) -> bool:
        """See the protocol. The family's decoder counts too, so that it is called what it is."""
        files = _files(path)
        try:
            # Tensors are memory maps: only their names are read.
            names = _tensors_in(files[0]) if len(files) == 1 else {}
        except UserError:
            return False
        return self.form.decoder in names or any(name.startswith(self.form.own_prefix) for name in names)

    def only_file(self, path: Path) -> Path:
        """Return the file at a path that was recognised.

        Raises:
            UserError: it is a folder with several.
        """
        files = _files(path)
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
            suffix = files[0].suffix
            raise UserError(f"{path} holds {len(files)} {suffix} files ({names}); name the image tokenizer's itself")
        return files[0]


def vqgan_name(name: str, num_levels: int) -> str:
    """Return the name that VQGAN's authors have for a tensor of a network with so many levels."""
    # They number the decoder's levels as the encoder's, from the highest resolution down.
    return with_vqgan_parts(_DECODER_LEVEL.sub(lambda found: f"decoder.up.{num_levels - 1 - int(found[1])}.", name))


def with_vqgan_parts(name: str) -> str:
    """Return a tensor's name with the names that VQGAN's authors have for its parts, the decoder's levels aside."""
    for pattern, replacement in _VQGAN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_vq_file(path: Path, form: VqForm) -> VqContents:
    """Return the contents of a file, as copies.

    Raises:
        UserError: a damaged file, one of another model, or tensors that do not fit each other. The message does not
            name the file.
    """
    return vq_contents(_tensors_in(path), form)


def vq_contents(found: Mapping[str, Tensor], form: VqForm) -> VqContents:
    """Do the same as :func:`read_vq_file`, for tensors by name."""
    stored = {name: tensor for name, tensor in found.items() if name not in form.unused}
    if form.decoder in stored:
        raise UserError(
            f"looks like {form.owner} decoder ({form.decoder}); give the image tokenizer's own, such as {form.example}"
        )
    for name in (_FIRST, CODEBOOK, form.file_name("encoder.conv_blocks.0.res.0.conv1.weight", 0)):
        if name not in stored:
            raise UserError(f"is not {form.owner} image tokenizer: tensor {name} is missing")
    sizes = _sizes(stored, form)
    network = _on_meta(form, sizes)
    wanted = form.quantizer_shapes(sizes) | _network_shapes(form, sizes, network)
    _check_shapes(stored, wanted, form.owner)
    tensors = {name: float32_copy(name, stored[name]) for name in wanted}
    return VqContents(form, sizes, tensors, {name: found[name] for name in form.unused if name in found})


def _tensors_in(path: Path) -> dict[str, Tensor]:
    content = contents_of(path)
    if isinstance(content, dict) and isinstance(content.get(_TRAINER), dict):
        content = content[_TRAINER]
    return tensors_under(content, (_OF_TRAINER, *_SECTIONS), path.stat().st_size)


def _files(path: Path) -> list[Path]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in found if file.suffix in _SUFFIXES and file.is_file()]


def _on_meta(form: VqForm, sizes: VqSizes) -> VqNetwork:
    """Build the network without weights, whatever their size."""
    with torch.device("meta"):
        return VqNetwork(sizes, form.quant_kernel)


def _names_in_file(form: VqForm, sizes: VqSizes, network: VqNetwork) -> dict[str, list[str]]:
    """Return the file's names, each with the network's names of its parts."""
    found: dict[str, list[str]] = {}
    for name in network.state_dict():
        found.setdefault(form.file_name(name, len(sizes.channels)), []).append(name)
    return found


def _network_shapes(form: VqForm, sizes: VqSizes, network: VqNetwork) -> dict[str, tuple[int, ...]]:
    state, found = network.state_dict(), {}
    for stored, names in _names_in_file(form, sizes, network).items():
        first, *rest = state[names[0]].shape
        found[stored] = (len(names) * first, *rest)
    return found


def _sizes(stored: Mapping[str, Tensor], form: VqForm) -> VqSizes:
    """Return the sizes. They are checked as far as building a network needs it."""

    def convolution(level: int, block: int) -> str:
        return form.file_name(f"encoder.conv_blocks.{level}.res.{block}.conv1.weight", 0)

    levels = next(level for level in itertools.count() if convolution(level, 0) not in stored)
    blocks = next(block for block in itertools.count() if convolution(0, block) not in stored)
    channels = [_channels(stored, convolution(level, 0)) for level in range(levels)]
    if "encoder.conv_out.weight" not in stored:
        raise UserError("tensor encoder.conv_out.weight is missing")
    return VqSizes(
        _channels(stored, _FIRST),
        tuple(channels),
        blocks,
        _shape(stored, "encoder.conv_out.weight", 4)[0],
        *_shape(stored, CODEBOOK, 2),
    )


def _channels(stored: Mapping[str, Tensor], name: str) -> int:
    channels = _shape(stored, name, 4)[0]
    if channels % NORM_GROUPS:
        raise UserError(f"tensor {name} has {channels} channels, not a multiple of the {NORM_GROUPS} groups of norms")
    return channels


def _shape(stored: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(stored[name].shape)
    if len(shape) != dimensions:
        raise UserError(f"tensor {name} has shape {list(shape)}, which has not {dimensions} sizes")
    if 0 in shape:
        raise UserError(f"tensor {name} has shape {list(shape)}, which holds nothing")
    return shape


def _check_shapes(stored: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], owner: str) -> None:
    for name in sorted(wanted.keys() - stored.keys()):
        raise UserError(f"tensor {name} is missing")
    for name in sorted(stored.keys() - wanted.keys()):
        raise UserError(f"tensor {name} is not one of {owner} image tokenizer's")
    for name, shape in wanted.items():
        if tuple(stored[name].shape) != shape:
            raise UserError(f"tensor {name} has shape {list(stored[name].shape)}, {list(shape)} would fit the others")
        if stored[name].dtype not in _FLOATS:
            raise UserError(f"tensor {name} has dtype {stored[name].dtype}, which is no float of 16 to 64 bits")
