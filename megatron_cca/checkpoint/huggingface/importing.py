"""Import a Hugging Face folder, or a file of a family's authors, into a Megatron checkpoint, piece by piece."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_cca.checkpoint import layout, summary
from megatron_cca.checkpoint.huggingface.huggingface_checkpoint import (
    HF,
    UNDESCRIBED,
    HuggingFaceCheckpoint,
    WeightsDescription,
    one_dtype,
)
from megatron_cca.checkpoint.huggingface.safetensors_files import OutgoingTensor, write_safetensors
from megatron_cca.checkpoint.stored_tensors import ByteProgress, Piece, save_pieces
from megatron_cca.checkpoint.summary import IMPORTED_FROM, config_of_weights, summarize
from megatron_cca.config import ParallelConfig
from megatron_cca.config.load import config_from_dict
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.output_folders import check_apart, check_output, claimed, staging
from megatron_cca.megatron_compat import COMMON_STATE, extra_state_keys
from megatron_cca.models import FAMILIES, resolve_architecture
from megatron_cca.models.architecture import check_layout, padded_output_size, padded_vocab_size
from megatron_cca.models.formats import WeightsFileFormat
from megatron_cca.models.naming import Naming
from megatron_cca.models.weight_files import (
    CONFIG,
    SAFETENSORS,
    chosen_set,
    contents_of,
    equal_tensors,
    is_recomputed,
    num_bytes,
    row_ranges,
    same_tensors,
    sets_in,
    tensors_under,
)
from megatron_cca.models.weight_map import MappedTensor

IMAGE_TOKENIZER = "--image-tokenizer"
# Names that a file of weights may end in.
_AUTHORS = (".pt", ".pth")
_SUFFIXES = (*_AUTHORS, SAFETENSORS)
# Files of a folder that a message lists.
_LISTED = 10


def import_checkpoint(
    hf: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    parallel: ParallelConfig | None = None,
    max_position_embeddings: int | None = None,
    sizes: Mapping[str, float] | None = None,
    section: str | None = None,
    dtype: Literal["fp32"] | None = None,
    image_tokenizer: str | Path | None = None,
    progress_bar: bool = True,
) -> Path:
    """Convert a Hugging Face folder, or a file of a family's authors, to a Megatron distributed checkpoint, bit-exact.

    The checkpoint loads at any TP x PP x VPP. Tokenizer, configurations and image tokenizer are kept beside the
    weights. Training copies them to its checkpoints, and :func:`export_checkpoint` writes them out again.

    Args:
        hf: a Hugging Face folder of a known family, in any of its forms, or a file of the family's authors.
        output: an empty or new folder. It will hold ``iter_0000000``, and ``training.pretrained_checkpoint`` can
            name it.
        overwrite: replace an earlier import in ``output``.
        parallel: the layout that the model is meant for. A layout that it cannot have is refused now.
        max_position_embeddings: size of a model whose weights do not tell it. The same key can be in ``sizes``.
        sizes: keys of the ``model`` section that a file's tensors do not tell, such as ``num_attention_heads``.
        section: which set of weights to take if several differ. The error message lists them.
        dtype: ``fp32`` converts bf16, fp16 or mixed weights to fp32, without loss. None keeps their bits.
        image_tokenizer: see :class:`WeightsDescription`.
        progress_bar: show a progress bar on a terminal.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: see :func:`open_public`; also if ``output`` holds something else, or the disk is full.
    """
    sizes = dict(sizes or {})
    if max_position_embeddings is not None:
        sizes["max_position_embeddings"] = max_position_embeddings
    tokenizer = None if image_tokenizer is None else Path(image_tokenizer)
    description = WeightsDescription(sizes, section=section, dtype=dtype, image_tokenizer=tokenizer)
    source = open_public(Path(hf), HF, description)
    output = Path(output)
    check_layout(source.architecture, source.model, parallel or ParallelConfig())
    partial_folder, final = layout.partial_folder(output, 0), layout.iteration_folder(output, 0)
    check_apart(output, source.folder, HF)
    frozen = source.frozen_tensors()
    pieces = [piece for tensor in source.format.weights.tensors(source.architecture) for piece in _cut(source, tensor)]
    pieces += [_whole(key, tensor) for key, tensor in frozen.items()]
    companions = [
        OutgoingTensor(bare, info.shape, info.dtype, source.files.pieces(name))
        for bare, name in sorted(source.companions.items())
        for info in [source.files.tensors[name]]
    ]
    total = sum(num_bytes(piece.sizes, piece.dtype) for piece in pieces)
    total += sum(tensor.num_bytes for tensor in companions)
    with ExitStack() as stack:
        stack.enter_context(claimed(output))
        unfinished = layout.own_names(output, 0) - {layout.LATEST, final.name}
        check_output(output, {layout.LATEST, final.name}, unfinished, overwrite=overwrite)
        stack.enter_context(staging(partial_folder, total))
        progress = stack.enter_context(ByteProgress("importing", total, shown=progress_bar))
        watched = [replace(piece, read=progress.watched(piece.read)) for piece in pieces]
        save_pieces(partial_folder, watched, _objects(source))
        _copy_files(source.companion_files(), partial_folder / layout.COMPANION_FILES)
        if companions:
            folder = partial_folder / layout.COMPANION_TENSORS
            folder.mkdir()
            write_safetensors(folder, [replace(one, pieces=progress.watch(one.pieces)) for one in companions])
        layout.finalize(partial_folder, output, 0, _summary(source))
    return final


def open_public(path: Path, option: str, description: WeightsDescription = UNDESCRIBED) -> PublicCheckpoint:
    """Recognise and check a folder or file of published weights.

    Args:
        path: the folder or file.
        option: the command-line option that named it, for messages.
        description: what the user said about it.

    Raises:
        UserError: see :class:`HuggingFaceCheckpoint` and :class:`WeightsFile`; also if ``path`` is a folder and
            ``description`` has sizes or an image tokenizer.
    """
    if path.is_file():
        return WeightsFile(path, option, description)
    if path.suffix in _SUFFIXES and not path.exists():
        raise UserError(f"{option}: no file at {path}; nothing is fetched from a hub here, download it first")
    _check_is_no_folder_of_files(path, option)
    if description.sizes:
        raise UserError(f"model.{next(iter(description.sizes))}: a folder says it itself, in {CONFIG}; leave it out")
    if description.image_tokenizer is not None:
        raise UserError(f"{IMAGE_TOKENIZER}: a folder's model has no tensors of it; leave it out")
    return HuggingFaceCheckpoint(path, option, description)


def _check_is_no_folder_of_files(path: Path, option: str) -> None:
    """Refuse a folder that has no configuration, but files of authors: they are named one by one."""
    if not path.is_dir() or (path / CONFIG).exists():
        return
    files = sorted(file.name for file in path.iterdir() if file.suffix in _AUTHORS)
    if files:
        others = len(files) - _LISTED
        more = f" and {others} more" if others > 0 else ""
        raise UserError(f"{option}: {path} holds {', '.join(files[:_LISTED])}{more}; name one of them itself")


class WeightsFile:
    """A weights file of a known family.

    Attributes:
        folder: path of the file. It has this name so that folder and file have the same interface.
        format, form, naming, model, architecture, dtype, companions: as in :class:`HuggingFaceCheckpoint`.

    Raises:
        UserError: the file is damaged, the family or a size is not known, there are several sets of weights, tensors
            are missing, unexpected or of another shape, or dtypes are mixed or not supported. Names the file and the
            tensor.
    """

    form = "a file of its authors"
    naming = Naming("file", {"": ""})

    def __init__(self, path: Path, option: str, description: WeightsDescription = UNDESCRIBED) -> None:
        self.folder, self.option, self.companions = path, option, {}
        self._image_tokenizer = description.image_tokenizer
        with error_context(f"{option}: {path}"):
            # Check types and ranges of the given sizes as keys of a configuration.
            config_from_dict({"model": dict(description.sizes)})
            self.format, found = _recognised(path, description.section)
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            self.model = self.format.read_model_config(shapes, description.sizes, description.assumed)
            self.architecture = resolve_architecture(self.model)
            self._tensors = {name: tensor for name, tensor in found.items() if not is_recomputed(name)}
            self._check_shapes()
            dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
            self.dtype = one_dtype(dtypes, description.dtype)
            self._check_zeros()
            rows = self.format.weights.row_shapes(self.architecture)
            self._tensors = {name: tensor.reshape(rows[name]) for name, tensor in self._tensors.items()}

    precision = HuggingFaceCheckpoint.precision

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start .. stop`` of a tensor, in :attr:`dtype`. ``name`` is from the weight map."""
        return self._tensors[name][start:stop].to(self.dtype).contiguous()

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the image tokenizer that the model has, by Megatron's keys. Most families have none.

        Raises:
            UserError: the file is missing, damaged or of other sizes, or the family needs none. Names the option.
        """
        wanted, path = self.format.frozen, self._image_tokenizer
        if wanted is None:
            if path is not None:
                raise UserError(f"{IMAGE_TOKENIZER}: {self.model.name} has no tensors of it; leave it out")
            return {}
        if path is None:
            # A file of their trainer holds the image tokenizer that it trained with.
            own = sets_in(contents_of(self.folder), (wanted.marker,), self.folder.stat().st_size)
            path = self.folder if own else self.folder.with_name(wanted.name)
        if not path.is_file():
            raise UserError(
                f"{IMAGE_TOKENIZER}: no file at {path}; {self.model.name} has frozen tensors of {wanted.name}, which "
                f"{wanted.published} has; put it there or name it"
            )
        with error_context(f"{IMAGE_TOKENIZER}: {path}"):
            return wanted.read(path, self.architecture)

    def companion_files(self) -> list[Path]:
        """Return no files. A file has none beside it."""
        return []

    def _check_shapes(self) -> None:
        wanted = self.format.weights.huggingface_shapes(self.architecture)
        for name, buffer in self.format.buffers(self.architecture).items():
            found = self._tensors.pop(name, buffer)
            if found.shape != buffer.shape:
                raise UserError(
                    f"tensor {name} has shape {list(found.shape)}, {self.model.name} has {list(buffer.shape)}"
                )
            if not torch.equal(found.to(buffer.dtype), buffer):
                raise UserError(f"tensor {name} is not that of {self.model.name}; the scales differ")
        for name in sorted(wanted.keys() - self._tensors.keys()):
            raise UserError(f"tensor {name} is missing")
        for name in sorted(self._tensors.keys() - wanted.keys()):
            raise UserError(f"tensor {name} belongs to no {self.model.name}")
        for name, shape in wanted.items():
            if tuple(self._tensors[name].shape) != shape:
                found = list(self._tensors[name].shape)
                raise UserError(f"tensor {name} has shape {found}, {self.model.name} has {list(shape)}")

    def _check_zeros(self) -> None:
        for name, tensor in self._tensors.items():
            if self.format.must_be_zero(name) and tensor.any():
                raise UserError(f"tensor {name} is not zero, as it is in every {self.model.name}")


PublicCheckpoint = HuggingFaceCheckpoint | WeightsFile


def gathered_rows(source: PublicCheckpoint, tensor: MappedTensor, start: int, stop: int) -> Tensor:
    """Return rows ``start .. stop`` of a Megatron tensor. Rows after its last one are padding: zeros."""
    parts = [source.read(rows.name, rows.start, rows.start + rows.count) for rows in tensor.cut(start, stop)]
    padding = stop - start - sum(part.size(0) for part in parts)
    if padding:
        shape = (padding,) if tensor.columns is None else (padding, tensor.columns)
        parts.append(torch.zeros(shape, dtype=source.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(source: PublicCheckpoint, tensor: MappedTensor) -> Iterator[Piece]:
    rows = _padded_rows(source, tensor) if tensor.padded else tensor.num_rows
    shape = (rows,) if tensor.columns is None else (rows, tensor.columns)
    stack, layer = ((), ()) if tensor.layer is None else ((source.architecture.num_layers,), (tensor.layer,))
    for start, stop in row_ranges(shape, source.dtype):
        yield Piece(
            key=tensor.key,
            global_shape=(*stack, *shape),
            offsets=(*layer, start, *(0 for _ in shape[1:])),
            sizes=(*(1 for _ in layer), stop - start, *shape[1:]),
            dtype=source.dtype,
            read=partial(gathered_rows, source, tensor, start, stop),
        )


def _padded_rows(source: PublicCheckpoint, tensor: MappedTensor) -> int:
    padded = padded_output_size if tensor.key.startswith("output_layer.") else padded_vocab_size
    return padded(source.architecture, source.model, 1)


def _whole(key: str, tensor: Tensor) -> Piece:
    shape, start = tuple(tensor.shape), (0,) * tensor.dim()
    return Piece(key, shape, start, shape, tensor.dtype, read=lambda: tensor)


def _copy_files(files: list[Path], to: Path) -> None:
    to.mkdir()
    for path in files:
        shutil.copyfile(path, to / path.name)


def _objects(source: PublicCheckpoint) -> dict:
    architecture = source.architecture
    extra_states = dict.fromkeys(extra_state_keys(architecture.num_layers, qk_layernorm=architecture.qk_layernorm))
    config = config_of_weights(source.model, source.precision)
    return {COMMON_STATE: summary.common_state(config, 0), **extra_states}


def _summary(source: PublicCheckpoint) -> dict:
    # No run wrote these weights: of a configuration only what they say is known.
    facts = summarize(config_of_weights(source.model, source.precision))
    return {**facts, IMPORTED_FROM: {"folder": str(source.folder), "form": source.form}}


def _recognised(path: Path, section: str | None) -> tuple[WeightsFileFormat, dict[str, Tensor]]:
    formats = {name: family.weights_file for name, family in FAMILIES.items() if family.weights_file}
    content, size = contents_of(path), path.stat().st_size
    for one in formats.values():
        sets = [found for found in sets_in(content, (one.marker,), size) if one.knows(found.weights)]
        if not sets:
            continue
        chosen = chosen_set(
            sets, section, are_alike=len(sets) > 1 and section is None and same_tensors(sets, equal_tensors)
        )
        if section is None and chosen.beside:
            raise UserError(
                f"tensor {chosen.beside[0]} is none of the weights under {chosen.place!r}; --section {chosen.place} "
                "takes those alone"
            )
        return one, chosen.weights
    sections = tuple(dict.fromkeys(section for one in formats.values() for section in one.sections))
    found = tensors_under(content, sections, size)
    raise UserError(f"is of no family known here ({', '.join(formats)}); it {_looks_like(found)}")


def _looks_like(found: Collection[str]) -> str:
    if not found:
        return "holds no tensors"
    if "quantize.embedding.weight" in found:
        return "looks like an image tokenizer, which is given as --image-tokenizer"
    if any(name.endswith("self_attn.q_proj.weight") for name in found):
        return "looks like a decoder as transformers names it; give its folder with config.json and safetensors"
    return f"holds {len(found)} tensors such as {next(iter(found))}"
