"""Read JourneyDB: a file of annotations as JSON lines beside the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cca.data.sources.external_text import JsonLines, clean_text, printable, short_hash
from megatron_cca.data.sources.folders import (
    LINKED,
    Root,
    UnreadFiles,
    checked_file,
    is_folder,
    is_image,
    names_in,
    outside_hint,
    read_below,
    real_folder,
    walk_files,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError

LISTS = "*anno*repath*.jsonl"
IMAGES = "imgs"
CAPTION_FIELDS = ("prompt", "Task2.Caption")


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether a folder, or ``data/train`` or ``data/valid`` in it, has JourneyDB's annotations."""
    return any(is_folder(folder) and _lists(folder) for folder in (path, path / "data/train", path / "data/valid"))


def open_journeydb(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder, or in ``data/<split>`` of it.

    Raises:
        UserError: no annotations or several, images that are missing or still packed, or a ``caption_field`` that
            JourneyDB does not have.
    """
    field = options.caption_field or CAPTION_FIELDS[0]
    if field not in CAPTION_FIELDS:
        raise UserError(f"caption_field: JourneyDB has no {field!r}; choose {' or '.join(CAPTION_FIELDS)}")
    folder, lists = _found_lists(path, options.split)
    if len(lists) > 1:
        raise UserError(f"{folder} has several lists ({', '.join(map(printable, lists))}); choose one by split")
    _check_images(folder)
    return JourneyDB(real_folder(folder, options.allow_outside), lists[0], field)


class JourneyDB:
    """Lines with "img_path", "prompt" and sometimes "Task2". The prompt is the condition.

    The name of a record is its line number. Names from inside the lines would need a pass over gigabytes of JSON.
    """

    def __init__(self, root: Root, annotations: str, caption_field: str) -> None:
        if not root.holds(IMAGES):
            hint = outside_hint([str(root / IMAGES)])
            raise UserError(f"{root / IMAGES} leaves the folder by a symbolic link; {hint}")
        self._images = real_folder(root / IMAGES, root.others)
        self._field, self._annotations = caption_field, annotations
        self._lines = JsonLines(checked_file(root, annotations, kinds=None))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, found = self._lines.label(index), self._lines.object(index)
        reference = found.get("img_path")
        if not isinstance(reference, str) or not reference:
            raise Unreadable(name, '"img_path" must be a file name')
        prompt = clean_text(found.get("prompt"), "prompt", name)
        caption = prompt if self._field == "prompt" else _described(found, name)
        return Record(name, caption, prompt, (read_below(self._images, reference, name),))

    def notices(self) -> list[str]:
        """See :class:`Source`. Walks through the images' folders."""
        unread, images = UnreadFiles(), 0
        for name in walk_files(self._images, unread, strict=False):
            if is_image(name):
                images += 1
            else:
                unread.add(name, LINKED if name.endswith("/") else None)
        lines = []
        if images > len(self):
            lines.append(f"{images} images lie in {IMAGES}, and {printable(self._annotations)} has {len(self)} lines")
        return lines + [f"in {IMAGES}, {line}" for line in [unread.line()] if line]

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return short_hash(self._lines.digest, self._field)


def _lists(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if Path(name).match(LISTS)]


def _found_lists(path: Path, split: str | None) -> tuple[Path, list[str]]:
    if split is not None and (not split or "/" in split or "\0" in split or split.startswith(".")):
        raise UserError(f"split: {printable(split)!r} is not the name of a split; choose train or valid")
    folders = [path, path / "data" / (split or "train")]
    for folder in folders:
        lists = _lists(folder) if is_folder(folder) else []
        if split is not None and folder == path:
            lists = [name for name in lists if name.startswith(split)]
        if lists:
            return folder, lists
    looked = " and ".join(printable(str(folder)) for folder in folders)
    raise UserError(f"no {LISTS}{f' of split {printable(split)}' if split else ''} in {looked}")


def _check_images(folder: Path) -> None:
    images = folder / IMAGES
    if not is_folder(images):
        raise UserError(f"{images} is missing; the images belong beside the annotations")
    names = names_in(images)
    if any(name.endswith((".tgz", ".tar.gz")) for name in names) and not any(
        is_folder(images / name) for name in names
    ):
        raise UserError(f"{images} is still packed; unpack each .tgz in it (tar -xzf FILE -C {IMAGES})")


def _described(found: dict[str, Any], name: str) -> str | None:
    described = found.get("Task2")
    if described is None:
        return None
    if not isinstance(described, dict):
        raise Unreadable(name, '"Task2" must be an object')
    return clean_text(described.get("Caption"), "Task2.Caption", name)
