"""ImageNet's layout: a folder for each class. The class is caption and condition; its label is the folder's place."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path, PurePosixPath

from megatron_cca.data.sources.files import MAX_TEXT_BYTES, is_file, is_folder, own_file, read_below, real_folder
from megatron_cca.data.sources.records import Record, Source, SourceOptions, Unreadable, checked_index
from megatron_cca.data.sources.texts import decoded, parsed_object, printable, tidy
from megatron_cca.data.sources.trees import ImageTree, is_image, walked
from megatron_cca.errors import UserError

NAMES = "classes.json"
SYNSETS = "LOC_synset_mapping.txt"
_LOOKED_AT = 1000


def recognises(path: Path) -> bool:
    """Whether all images of a folder lie in sub-folders of it, without texts beside them."""
    if not is_folder(path):
        return False
    images = list(islice((name for name in walked(path) if is_image(name)), _LOOKED_AT))
    in_classes = all(len(PurePosixPath(name).parts) == 2 for name in images)
    return bool(images) and in_classes and not any(is_file((path / name).with_suffix(".txt")) for name in images)


def open_classes(path: Path, options: SourceOptions) -> Source:
    """The source in a folder.

    Raises:
        UserError: no images, or a list of class names that cannot be read.
    """
    if not is_folder(path):
        raise UserError(f"{path} is not a folder; give the one that holds the classes' folders")
    return ClassFolders(real_folder(path))


class ClassFolders:
    """Images below a folder for each class; ``classes.json`` or ``LOC_synset_mapping.txt`` may give better names.

    Labels count the folders in the order of their names, as torchvision's ``ImageFolder`` does; one without images,
    which that refuses, does not count.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._images = ImageTree(root)
        self._captions = _class_names(root)
        folders = {path.partition("/")[0] for path in self._images.paths if "/" in path}
        self._labels = {folder: label for label, folder in enumerate(sorted(folders))}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        index = checked_index(index, len(self))
        name, path = self._images.names[index], self._images.paths[index]
        folder = PurePosixPath(path).parts[0]
        if folder == path:
            raise Unreadable(name, "lies in no class's folder")
        condition = tidy(folder, "the class's folder", name)
        caption = self._captions.get(folder, folder.replace("_", " "))
        content = read_below(self._root, path, name)
        return Record(name, tidy(caption, "caption", name), condition, (content,), label=self._labels[folder])

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        digest = self._images.digest()
        digest.update(json.dumps(self._captions, sort_keys=True).encode())
        return digest.hexdigest()[:16]


def _class_names(root: Path) -> dict[str, str]:
    """Captions by folder, from whichever list is there."""
    for file, parse in ((NAMES, _parsed_names), (SYNSETS, _parsed_synsets)):
        if is_file(root / file):
            own_file(root, file)
            try:
                return parse(read_below(root, file, file, MAX_TEXT_BYTES))
            except Unreadable as error:
                raise UserError(f"{printable(str(root))}: {error.reason}; correct {file} or remove it") from None
    return {}


def _parsed_names(content: bytes) -> dict[str, str]:
    found = parsed_object(content, NAMES, NAMES)
    for folder, caption in found.items():
        if tidy(caption, f"{NAMES}: the name of {printable(folder)}", NAMES) is None:
            raise Unreadable(NAMES, f"{NAMES}: {printable(folder)} has no name")
    return found


def _parsed_synsets(content: bytes) -> dict[str, str]:
    """ "n01440764 tench, Tinca tinca": the first name is the caption."""
    found = {}
    for number, line in enumerate(decoded(content, SYNSETS, SYNSETS).splitlines(), 1):
        folder, _, names = line.strip().partition(" ")
        if folder and not (caption := names.split(",")[0].strip()):
            raise Unreadable(SYNSETS, f"{SYNSETS}:{number} has no name after {printable(folder)}")
        if folder:
            found[folder] = caption
    return found
