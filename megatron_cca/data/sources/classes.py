"""Read ImageNet's layout: one folder per class. The class is caption and condition. Its label is the folder's index."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath

from megatron_cca.data.sources.external_text import clean_text, decoded, parsed_object, printable, split_of
from megatron_cca.data.sources.folders import (
    MAX_TEXT_BYTES,
    ImageTree,
    Root,
    checked_file,
    first_images,
    is_file,
    is_folder,
    names_in,
    read_below,
    real_folder,
    text_beside,
)
from megatron_cca.data.sources.source_protocol import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.errors import UserError

NAMES = "classes.json"
SYNSETS = "LOC_synset_mapping.txt"


def recognises(path: Path, options: SourceOptions) -> bool:
    """Return whether all images of a folder lie in its sub-folders, without texts beside them."""
    if not is_folder(path):
        return False
    root = real_folder(path, options.allow_outside)
    images = first_images(root)
    in_classes = all(len(PurePosixPath(name).parts) == 2 for name in images)
    return bool(images) and in_classes and not any(text_beside(path, name) for name in images)


def open_classes(path: Path, options: SourceOptions) -> Source:
    """Open the source in a folder.

    Raises:
        UserError: no images, folders that are splits and not classes, or a list of class names that cannot be read or
            has the names of other classes.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds the classes' folders")
    return ClassFolders(real_folder(path, options.allow_outside))


class ClassFolders:
    """Images in one folder per class. ``classes.json`` or ``LOC_synset_mapping.txt`` may give better names.

    Labels count the folders in the order of their names, as torchvision's ``ImageFolder`` does. A folder without
    images, which torchvision refuses, does not count.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._images = ImageTree(root, others=(NAMES, SYNSETS))
        paths = (self._images.paths[index] for index in range(len(self._images)))
        # The folder, and whether the image lies deeper than in it.
        places = Counter((path.partition("/")[0], path.count("/") > 1) for path in paths if "/" in path)
        self._deeper = sum(count for (_, is_deeper), count in places.items() if is_deeper)
        folders = sorted({folder for folder, _ in places})
        _refuse_splits(root, folders)
        self._names_from, self._captions = _class_names(root)
        _refuse_other_names(root, self._names_from, self._captions, folders)
        self._labels = {folder: label for label, folder in enumerate(folders)}

    @property
    def num_classes(self) -> int:
        """The number of folders that are a class."""
        return len(self._labels)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, path = self._images.names[index], self._images.paths[index]
        folder = PurePosixPath(path).parts[0]
        if folder == path:
            raise Unreadable(name, "lies in no class's folder")
        condition = clean_text(folder, "the class's folder", name)
        caption = self._captions.get(folder, folder.replace("_", " "))
        content = read_below(self._root, path, name)
        return Record(name, clean_text(caption, "caption", name), condition, (content,), label=self._labels[folder])

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        digest = self._images.digest()
        digest.update(json.dumps(self._captions, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def notices(self) -> list[str]:
        """See :class:`Source`."""
        lines = []
        if len(self._labels) == 1:
            lines.append(f"all images are of one class, {printable(next(iter(self._labels)))}")
        if self._deeper:
            lines.append(f"{self._deeper} images lie deeper than in a class's folder; the first folder is their class")
        empty = [name for name in names_in(self._root.path) if is_folder(self._root / name)]
        if empty := [name for name in empty if name not in self._labels]:
            lines.append(
                f"{len(empty)} folders hold no images and count as no class ({printable(empty[0])}): "
                "labels count the other folders"
            )
        return lines + self._name_notices() + self._images.notices()

    def _name_notices(self) -> list[str]:
        if self._names_from is None:
            return []
        lines = []
        if nameless := [folder for folder in self._labels if folder not in self._captions]:
            lines.append(
                f"{len(nameless)} classes have no name in {self._names_from} and keep that of their folder "
                f"({printable(nameless[0])})"
            )
        if homeless := [folder for folder in self._captions if folder not in self._labels]:
            lines.append(f"{len(homeless)} names in {self._names_from} are of no folder ({printable(homeless[0])})")
        if self._names_from != SYNSETS and is_file(self._root / SYNSETS):
            lines.append(f"{SYNSETS} is not read, since there is {self._names_from}")
        return lines


def _refuse_splits(root: Root, folders: list[str]) -> None:
    """Refuse folders whose names are those of splits. Splits hold classes, or images of all classes."""
    splits = [folder for folder in folders if split_of(folder.lower())]
    kinds = {split_of(folder.lower()) for folder in splits}
    if splits and (len(splits) == len(folders) or len(kinds) > 1):
        shown = " and ".join(f"{printable(folder)}/" for folder in splits[:3])
        raise UserError(
            f"{printable(str(root))}: {shown} hold a split of a data set each and are no classes; give one of them: "
            f"{printable(str(root / splits[0]))}"
        )


def _refuse_other_names(root: Root, file: str | None, names: dict[str, str], folders: list[str]) -> None:
    if names and folders and not names.keys() & set(folders):
        raise UserError(
            f"{printable(str(root / file))} names {printable(next(iter(names)))!r}, and none of the folders, such as "
            f"{printable(folders[0])!r}; correct it or remove it"
        )


def _class_names(root: Root) -> tuple[str | None, dict[str, str]]:
    """Return the file that names classes, and the captions by folder."""
    for file, parse in ((NAMES, parsed_names), (SYNSETS, _parsed_synsets)):
        if is_file(root / file):
            checked_file(root, file)
            try:
                return file, parse(read_below(root, file, file, MAX_TEXT_BYTES))
            except Unreadable as error:
                raise UserError(f"{printable(str(root))}: {error.reason}; correct {file} or remove it") from None
    return None, {}


def parsed_names(content: bytes) -> dict[str, str]:
    """Return the names in the contents of ``classes.json``, by folder or label.

    Raises:
        Unreadable: it holds something else.
    """
    found = parsed_object(content, NAMES, NAMES)
    for folder, caption in found.items():
        if clean_text(caption, f"{NAMES}: the name of {printable(folder)}", NAMES) is None:
            raise Unreadable(NAMES, f"{NAMES}: {printable(folder)} has no name")
    return found


def _parsed_synsets(content: bytes) -> dict[str, str]:
    """Return the first name of each line such as "n01440764 tench, Tinca tinca", by folder."""
    found = {}
    for number, line in enumerate(decoded(content, SYNSETS, SYNSETS).splitlines(), 1):
        folder, _, names = line.strip().partition(" ")
        if folder and not (caption := names.split(",")[0].strip()):
            raise Unreadable(SYNSETS, f"{SYNSETS}:{number} has no name after {printable(folder)}")
        if folder:
            found[folder] = caption
    return found
