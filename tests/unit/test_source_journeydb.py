"""JourneyDB: images in numbered folders beside one list, as its authors give them out."""

from megatron_cca.data.sources import Record, SourceOptions, open_source
from tests.references.sources import A, B, everything, lines, notices, refused, write_all


def journeydb(folder, *objects, name="train_anno_realease_repath.jsonl"):
    return write_all(folder, {name: lines(*objects), "imgs/000/a.jpg": B, "imgs/001/b.jpg": A})


PAIR = (
    {"img_path": "./000/a.jpg", "prompt": " P ", "Task2": {"Caption": "C"}},
    {"img_path": "./001/b.jpg", "prompt": "Q"},
)


def test_journeydb(tmp_path):
    folder = journeydb(tmp_path / "data/train", *PAIR)
    journeydb(tmp_path / "data/valid", PAIR[1], name="valid_anno_repath.jsonl")
    name = "train_anno_realease_repath.jsonl:1"
    for path in (folder, tmp_path):
        source = open_source(path)
        assert source[0] == Record(name, "P", "P", (B,))
    described = open_source(tmp_path, options=SourceOptions(caption_field="Task2.Caption"))
    assert [(record.caption, record.condition) for record in described] == [("C", "P"), (None, "Q")]
    assert described.fingerprint() != source.fingerprint()
    valid = open_source(tmp_path, options=SourceOptions(split="valid"))
    assert [record.caption for record in valid] == ["Q"]


def test_journeydbs_refusals(tmp_path):
    folder = journeydb(tmp_path, *PAIR)
    assert "choose prompt or Task2.Caption" in refused(folder, caption_field="caption")
    for split in ("../x", "/etc", "", ".", "a\0"):
        assert "is not the name of a split" in refused(folder, split=split)
    assert "no *anno*repath*.jsonl of split valid" in refused(folder, "journeydb", split="valid")
    journeydb(folder, PAIR[1], name="valid_anno_repath.jsonl")
    assert "has several lists" in refused(folder)
    assert len(open_source(folder, options=SourceOptions(split="valid"))) == 1
    assert "is missing; the images belong beside" in refused(
        write_all(tmp_path / "none", {"anno_repath.jsonl": lines(*PAIR)})
    )
    packed = write_all(tmp_path / "packed", {"anno_repath.jsonl": lines(*PAIR), "imgs/000.tgz": b"x"})
    assert "is still packed; unpack each .tgz" in refused(packed)


def test_journeydbs_lines_that_cannot_be_read(tmp_path):
    bad = [{"img_path": 3}, {"img_path": "../x"}, {"img_path": "000/a.jpg", "prompt": []}, {"img_path": "000/z.jpg"}]
    messages = [text.partition(": ")[2] for text in everything(open_source(journeydb(tmp_path, *bad)))]
    assert messages == [
        '"img_path" must be a file name',
        "../x leaves the folder",
        "prompt must be a string, found a list",
        "000/z.jpg is missing",
    ]
    described = SourceOptions(caption_field="Task2.Caption")
    journeydb(tmp_path, {"img_path": "000/a.jpg", "Task2": 3}, {"img_path": "000/a.jpg", "Task2": {"Caption": 3}})
    found = everything(open_source(tmp_path, options=described))
    assert found[0].endswith('"Task2" must be an object')
    assert found[1].endswith("Task2.Caption must be a string, found a number")


def test_journeydbs_extra_images_are_counted(tmp_path):
    listed = lines({"img_path": "000/a.jpg", "prompt": "P"})
    files = {"anno_repath.jsonl": listed, "imgs/000/a.jpg": B, "imgs/000/b.jpg": B, "imgs/001.tgz": b"x"}
    write_all(tmp_path, files)
    assert notices(tmp_path) == [
        "2 images lie in imgs, and anno_repath.jsonl has 1 lines",
        "in imgs, not read: 1 .tgz (001.tgz)",
    ]
