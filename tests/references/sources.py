"""Sources of images as users have them: known files on a disk, and what is read of them."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_cca.data.sources import SourceOptions, Unreadable, open_source
from megatron_cca.errors import UserError

SCRIPTS = ["a cat", "一只猫", "قطة سوداء", "e\u0301 \U0001f408\u200d", 'quote " \\ and\nline']


def picture(shade, kind="PNG"):
    """Return a small image of one grey level, encoded."""
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(content, kind)
    return content.getvalue()


A, B, C = picture(10), picture(20, "JPEG"), picture(30, "WEBP")
PAIRS = [{"file_name": "a.png", "caption": "a"}, {"file_name": "b.png", "caption": "b"}]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def zipped(text):
    """Compress by gzip, without the time, which would be in the name of a test."""
    return gzip.compress(text.encode(), mtime=0)


def write(folder, name, content):
    """Write a file of a folder, which is made where it is missing; return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_all(folder, files):
    """Write files by name; return the folder."""
    for name, content in files.items():
        write(folder, name, content)
    return folder


def linked(folder, name, target):
    """Make a symbolic link in a folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def lines(*objects):
    """Return one JSON object a line."""
    return "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects)


def tar(path, files, kind=tarfile.PAX_FORMAT, **attributes):
    """Write a tar of (name, content), all with the same attributes; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in files:
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            file.addfile(member, io.BytesIO(content))
    return path


def rows(*captions, **columns):
    """Return a data set of Hugging Face with the images A and B, their captions and other columns."""
    import datasets

    columns = {"image": [{"bytes": A, "path": "a.png"}, {"bytes": B, "path": None}], "caption": captions, **columns}
    found = datasets.Dataset.from_dict({name: list(values) for name, values in columns.items() if len(values)})
    return found.cast_column("image", datasets.Image()) if "image" in found.column_names else found


def read(source, index):
    """Return a record, or the one line that says why it cannot be read."""
    try:
        return source[index]
    except Unreadable as error:
        assert "\n" not in str(error)
        str(error).encode()
        return str(error)


def everything(source):
    """Return all records; lines in place of those that cannot be read."""
    return [read(source, index) for index in range(len(source))]


def notices(path, layout="auto", **options):
    """Return what a source says about itself at the start."""
    found = open_source(path, layout, SourceOptions(**options)).notices()
    assert all(line.isprintable() for line in found)
    return found


def refused(path, layout="auto", **options):
    """Return the one line by which a source is refused as a whole."""
    with pytest.raises(UserError) as error:
        open_source(path, layout, SourceOptions(**options))
    message = str(error.value)
    assert message.isprintable()
    return message
