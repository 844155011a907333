"""Whether a source and its records are for a model: classes, codes, their grid.

A model of classes, or of one grid, is given sources that were made for it. What one record has wrong there, all have,
or their labels mean something else: it ends the job, while a record that is damaged or unusual is skipped.
"""

from __future__ import annotations

from megatron_cca.data.image_headers import Rejected
from megatron_cca.data.sources import Record, Source
from megatron_cca.data.sources.classes import ClassFolders
from megatron_cca.errors import UserError
from megatron_cca.models.image_vocabulary import ImageVocabulary


def class_of(record: Record, vocabulary: ImageVocabulary) -> int:
    """A record's class, for a model that takes classes.

    Raises:
        UserError: it has none, or one that the model does not know.
    """
    if record.label is None:
        raise UserError(f"--source: {record.name} has no class, and the model takes nothing else")
    if record.label >= vocabulary.num_classes:
        raise UserError(
            f"--source: {record.name} has the label {record.label}, the model takes 0 to {vocabulary.num_classes - 1}"
        )
    return record.label


def class_notices(source: Source, vocabulary: ImageVocabulary) -> list[str]:
    """Say of folders of classes that are fewer than the model's which of its classes they are taken for."""
    known = vocabulary.num_classes
    if known is None or not isinstance(source, ClassFolders) or source.num_classes >= known:
        return []
    return [
        f"folders of {source.num_classes} classes, while the model has {known}: they are taken for its first "
        f"{source.num_classes}, in the order of their names"
    ]


def check_codes(record: Record, vocabulary: ImageVocabulary, grid: tuple[int, int] | None) -> None:
    """Refuse codes that are not the model's.

    Args:
        record: with codes.
        vocabulary: the model's.
        grid: height and width of the only one that it takes; None where it takes any.

    Raises:
        Rejected: of a model that takes any grid.
        UserError: of a model that takes one.
    """
    size = vocabulary.codebook_size
    if grid is None:
        if not record.codes.size or record.codes.max() >= size:
            raise Rejected(f"its codes are not those of a codebook of {size}")
        return
    *_, frames, height, width = record.codes.shape
    if (frames, height, width) != (1, *grid):
        found, own = (_sized(one, record.pixels_per_code) for one in ((height, width), grid))
        or_else = f", or, for a model of these, --grid {height} {width}" if (frames, height) == (1, width) else ""
        raise UserError(f"--source: {record.name} has {found}, the model takes {own}; give codes of that size{or_else}")
    if record.codes.max() >= size:
        raise UserError(
            f"--source: {record.name} has codes of another codebook: {record.codes.max()} is beyond the model's {size}"
        )


def _sized(grid: tuple[int, int], pixels_per_code: int | None) -> str:
    said = f"{grid[0]} x {grid[1]} codes"
    if pixels_per_code is None:
        return said
    return f"{said} ({grid[0] * pixels_per_code} x {grid[1] * pixels_per_code} pixels)"
