"""Choose the column of a data set that holds the captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_cca.data.sources.confined_files import Root
from megatron_cca.data.sources.foreign_text import CAPTION_FIELDS, OF_LIST_HINT, printable
from megatron_cca.data.sources.source_protocol import SourceOptions
from megatron_cca.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = (*CAPTION_FIELDS, "prompt")
_NAMES_OF_LISTS = (*_NAMES, *(f"{name}s" for name in _NAMES))


def caption_column(
    dataset: Dataset, options: SourceOptions, image: str, root: Root
) -> tuple[str | None, tuple[str, ...]]:
    """Return the column with text, else the one with classes. None where there is neither.

    Args:
        dataset: the rows.
        options: of the user. They may name the column, and allow lists of captions.
        image: the column of the images.
        root: the folder of the data, for messages.

    Returns:
        Its name, and notices about the other columns, see :class:`~megatron_cca.data.sources.source_protocol.Source`.

    Raises:
        UserError: no such column, several possible ones, texts under no known name, or lists of captions that are not
            allowed.
    """
    from datasets import ClassLabel

    texts, lists = _texts(dataset, image)
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    field = options.caption_field
    if field is not None:
        if field not in texts + labels + lists:
            shown = _shown(texts + labels + lists) or "none"
            raise UserError(f"caption_field: {root} has no text in {printable(field)!r}; columns of text: {shown}")
        if field in lists and options.caption_of_list is None:
            raise UserError(_of_lists(root, field))
        return field, ()
    if found := [name for name in _NAMES if name in texts]:
        return found[0], ()
    named_lists = [name for name in _NAMES_OF_LISTS if name in lists]
    if named_lists and (options.caption_of_list is not None or not labels):
        if options.caption_of_list is None:
            raise UserError(_of_lists(root, named_lists[0]))
        return named_lists[0], ()
    if len(labels) > 1:
        raise UserError(f"caption_field: {root} has several columns of classes; choose one of {', '.join(labels)}")
    if not labels and (texts or lists):
        raise UserError(
            f"caption_field: {root} has no column {', '.join(_NAMES)}; --caption-field chooses one of "
            f"{_shown(texts + lists)}"
        )
    others = (f"columns of text are not read (--caption-field): {_shown(texts + lists)}",) if texts + lists else ()
    return (labels[0], others) if labels else (None, ())


def _texts(dataset: Dataset, image: str) -> tuple[list[str], list[str]]:
    """Return the columns of text, and those of lists of texts."""
    features = {name: feature for name, feature in dataset.features.items() if name != image}
    lists = [name for name, feature in features.items() if _is_text(_inner(feature))]
    return [name for name, feature in features.items() if _is_text(feature)], lists


def _inner(feature: Any) -> Any:
    """Return the feature inside a list."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def _shown(names: list[str]) -> str:
    return ", ".join(map(printable, names))


def _of_lists(root: Root, column: str) -> str:
    return f"caption_field: {root}: column {printable(column)!r} holds lists of captions; {OF_LIST_HINT}"
