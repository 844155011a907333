"""Check that a source and its records fit a model: classes, codes, their grid.

The source for a model of classes, or of one grid, is made for that model. If one record does not fit, no record does,
or their labels mean something else. That ends the job. A record that is damaged or unusual is skipped instead.
"""

from __future__ import annotations

from megatron_cca.data.image_headers import Rejected
from megatron_cca.data.sources import Record, Source
from megatron_cca.data.sources.classes import ClassFolders
from megatron_cca.errors import UserError
from megatron_cca.models.image_vocabulary import ImageVocabulary


def class_of(record: Record, vocabulary: ImageVocabulary) -> int:
    """Return a record's class, for a model that takes classes.

    Raises:
        UserError: the record has no class, or one beyond the model's.
    """
    if record.label is None:
        raise UserError(f"--source: {record.name} has no class, and the model takes nothing else")
    if record.label >= vocabulary.num_classes:
        raise UserError(
            f"--source: {record.name} has the label {record.label}, the model takes 0 to {vocabulary.num_classes - 1}"
        )
    return record.label


def class_notices(source: Source, vocabulary: ImageVocabulary) -> list[str]:
    """Return a notice where a source has fewer class folders than the model has classes.

    It says which classes they become.
    """
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
        grid: height and width of the only one that the model takes. None where it takes any.

    Raises:
        Rejected: wrong codes for a model that takes any grid.
        UserError: wrong codes for a model that takes one grid.
    """
    size = vocabulary.codebook_size
    if grid is None:
        if not record.codes.size or record.codes.max() >= size:
            raise Rejected(f"its codes are not those of a codebook of {size}")
        return
    *_, frames, height, width = record.codes.shape
    if (frames, height, width) != (1, *grid):
        found, own = (_grid_text(one, record.pixels_per_code) for one in ((height, width), grid))
        or_else = f", or, for a model of these, --grid {height} {width}" if (frames, height) == (1, width) else ""
        raise UserError(f"--source: {record.name} has {found}, the model takes {own}; give codes of that size{or_else}")
    if record.codes.max() >= size:
        raise UserError(
            f"--source: {record.name} has codes of another codebook: {record.codes.max()} is beyond the model's {size}"
        )


def _grid_text(grid: tuple[int, int], pixels_per_code: int | None) -> str:
    text = f"{grid[0]} x {grid[1]} codes"
    if pixels_per_code is None:
        return text
    return f"{text} ({grid[0] * pixels_per_code} x {grid[1] * pixels_per_code} pixels)"
