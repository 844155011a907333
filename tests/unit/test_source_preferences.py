"""Preferences: lines of JSON, and data sets in the columns of Pick-a-Pic, HPDv2 and ImageRewardDB.

The oracle is the disk: ``datasets`` writes rows whose winner is known, and pairs name their images by the contents.
"""

import pytest

from megatron_cca.data.sources import SourceOptions, Unreadable, open_source
from megatron_cca.data.sources.source_protocol import NoPair
from tests.references.sources import A, B, C, everything, lines, notices, picture, refused, write, write_all

D = picture(40)


def pairs(comparison):
    """Return prompt, and the contents of the better and the worse image of each pair."""
    images = [image if isinstance(image, Unreadable) else image.frames[0] for image in comparison.images]
    return comparison.caption, [(images[better], images[worse]) for better, worse in comparison.pairs]


def listed(folder, *rows):
    write_all(folder, {"a.png": A, "in/b.jpg": B, "c.webp": C, "d.png": D, "e.png": A})
    write(folder, "preferences.jsonl", lines(*rows))
    return open_source(folder)


def test_lines_of_winners_and_losers_and_of_scores(tmp_path):
    source = listed(
        tmp_path,
        {"prompt": " 猫 ", "winner": "a.png", "loser": "in/b.jpg"},
        {"caption": "several", "winner": "a.png", "loser": ["in/b.jpg", "c.webp"]},
        {"prompt": "scored", "images": ["a.png", "in/b.jpg", "c.webp"], "scores": [1, 3.5, 1]},
        {"prompt": "one image twice", "images": ["a.png", "e.png", "d.png"], "scores": [2, 2, 1]},
        {"label": 7, "winner": "d.png", "loser": "c.webp"},
    )
    assert [pairs(one) for one in source] == [
        ("猫", [(A, B)]),
        ("several", [(A, B), (A, C)]),
        ("scored", [(B, A), (B, C)]),
        ("one image twice", [(A, D)]),
        (None, [(D, C)]),
    ]
    assert len(source[3].images) == 2
    assert [image.name for image in source[1].images] == [f"preferences.jsonl:2, image {place}" for place in (1, 2, 3)]
    assert {image.caption for image in source[2].images} == {"scored"}
    assert [one.label for one in source] == [None] * 4 + [7]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a.png", "d.png"], "scores": [0.5, 0.5]}, "a tie: none of its images is better"),
        ({"winner": "a.png", "loser": "e.png"}, "a tie: its images are the same"),
        ({"winner": "a.png"}, "it has one image; a pair takes two"),
        ({"winner": "a.png", "loser": ""}, "it has one image; a pair takes two"),
        ({"images": ["a.png"], "scores": [1]}, "it has one image; a pair takes two"),
        ({"images": ["a.png", "d.png"], "scores": [1, None]}, "it has no scores; a pair takes two"),
    ],
)
def test_what_is_in_order_and_has_no_pair(row, reason, tmp_path):
    with pytest.raises(NoPair) as error:
        listed(tmp_path, {"prompt": "p", **row})[0]
    assert reason in error.value.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a.png", "d.png"], "scores": [1]}, "has 2 images and 1 scores"),
        ({"images": ["a.png", "d.png"], "scores": [1, "2"]}, "a score must be a number"),
        ({"images": ["a.png", "d.png"], "scores": [1, True]}, "a score must be a number"),
        ({"images": ["a.png", "d.png"]}, 'the line needs "winner" and "loser", or "images" and "scores"'),
        ({"image": "a.png", "rank": 1, "prompt_id": "1"}, 'the line needs "winner" and "loser"'),
        ({"prompt": 3, "winner": "a.png", "loser": "d.png"}, "caption must be a string"),
        ({"label": "cat", "winner": "a.png", "loser": "d.png"}, '"label" must be the number of a class'),
    ],
)
def test_what_is_wrong_with_a_line_is_said(row, reason, tmp_path):
    with pytest.raises(Unreadable) as error:
        listed(tmp_path, {"prompt": "p", **row})[0]
    assert not isinstance(error.value, NoPair)
    assert reason in error.value.reason


def test_an_image_that_cannot_be_read_does_not_spoil_the_others(tmp_path):
    row = {"images": ["a.png", "gone.png", "../x.png", 4, "d.png"], "scores": [5, 4, 3, 2, 1]}
    (comparison,) = listed(tmp_path, {"prompt": "p", **row})
    reasons = [image.reason for image in comparison.images if isinstance(image, Unreadable)]
    assert reasons == ["gone.png is missing", "../x.png leaves the folder", "must be a file name"]
    assert len(comparison.pairs) == 10
    assert pairs(comparison)[1][3] == (A, D)


def test_what_a_folder_of_lines_says_about_itself(tmp_path):
    source = listed(tmp_path, {"prompt": "p", "words": "q", "winner": "a.png", "loser": "./in/b.jpg"})
    assert notices(tmp_path) == ["3 of 5 images that lie there are not in preferences.jsonl and are not read"]
    by_field = open_source(tmp_path, "preferences", SourceOptions(caption_field="words"))
    assert by_field[0].caption == "q"
    assert by_field.fingerprint() != source.fingerprint() == open_source(tmp_path).fingerprint()
    assert "no line of" in refused(tmp_path, caption_field="word")
    assert "split: " in refused(tmp_path, split="train")


def embedded(*images):
    return [{"bytes": image, "path": None} for image in images]


def saved(folder, features, **columns):
    """Write a data set as its authors' loader makes it, in Parquet."""
    import datasets

    (folder / "data").mkdir(parents=True)
    found = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    found.to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


def pick_a_pic(folder):
    from datasets import Value

    kinds = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "label_1": "float64"}
    return saved(
        folder,
        {**{name: Value(kind) for name, kind in kinds.items()}, "has_label": Value("bool")},
        caption=["first", "second", "tie", "unjudged", "one image"],
        jpg_0=[A, A, A, A, A],
        jpg_1=[B, C, B, B, b""],
        label_0=[1.0, 0.0, 0.5, 0.0, 1.0],
        label_1=[0.0, 1.0, 0.5, 1.0, 0.0],
        has_label=[True, True, True, False, True],
    )


def test_pick_a_pic(hf_cache, tmp_path):
    source = open_source(pick_a_pic(tmp_path / "pick"))
    assert [pairs(source[index]) for index in (0, 1)] == [("first", [(A, B)]), ("second", [(C, A)])]
    reasons = []
    for index in (2, 3, 4):
        with pytest.raises(NoPair) as error:
            source[index]
        reasons.append(str(error.value))
    assert reasons == [
        "train:2: a tie: none of its images is better than another",
        "train:3: nobody judged it",
        "train:4: it has one image; a pair takes two images, of which one is better",
    ]


def test_hpdv2_as_its_loader_makes_it(hf_cache, tmp_path):
    from datasets import Image, Sequence, Value

    features = {"prompt": Value("string"), "image": Sequence(Image()), "human_preference": Sequence(Value("int8"))}
    images = [embedded(A, B), embedded(A, B)]
    train = saved(tmp_path / "train", features, prompt=["p", "q"], image=images, human_preference=[[1, 0], [0, 1]])
    assert [pairs(one) for one in open_source(train)] == [("p", [(A, B)]), ("q", [(B, A)])]
    features = {"prompt": Value("string"), "image": Sequence(Image()), "rank": Sequence(Value("int8"))}
    ranked = saved(tmp_path / "test", features, prompt=["p"], image=[embedded(A, B, C)], rank=[[2, 3, 1]])
    assert [pairs(one) for one in open_source(ranked)] == [("p", [(A, B), (C, A), (C, B)])]


def test_hpdv2_with_its_images_in_files(hf_cache, tmp_path):
    from datasets import Sequence, Value

    features = {
        "prompt": Value("string"),
        "image_path": Sequence(Value("string")),
        "human_preference": Sequence(Value("int8")),
    }
    paths = [["a.png", "b.jpg"]]
    folder = saved(tmp_path / "set", features, prompt=["p"], image_path=paths, human_preference=[[0, 1]])
    write_all(folder, {"a.png": A, "b.jpg": B})
    assert [pairs(one) for one in open_source(folder)] == [("p", [(B, A)])]


def test_image_reward_db_in_rows_of_one_image(hf_cache, tmp_path):
    from datasets import Image, Value

    kinds = {"prompt_id": "string", "prompt": "string", "rank": "int8", "overall_rating": "int8"}
    folder = saved(
        tmp_path / "rows",
        {"image": Image(), **{name: Value(kind) for name, kind in kinds.items()}},
        image=embedded(A, D, B, C, A, B),
        prompt_id=["9-1", "2-2", "9-1", "9-1", "3-3", "3-3"],
        prompt=["nine", "two", "nine", "nine", "three", "other"],
        # Rank and rating contradict each other here: the rank counts, and 1 is the best.
        rank=[2, 1, 1, 2, 1, 2],
        overall_rating=[7, 1, 1, 6, 1, 1],
    )
    source = open_source(folder)
    assert pairs(source[0]) == ("nine", [(B, A), (B, C)])
    assert everything(source)[1:] == [
        "train:2-2: it has one image; a pair takes two images, of which one is better",
        "train:3-3: has 2 different prompts under one prompt_id",
    ]
    # As images with captions they are still read where one asks for it.
    assert len(open_source(folder, "datasets")) == 6


def test_image_reward_db_in_groups_and_in_pairs(hf_cache, tmp_path):
    import datasets
    from datasets import Image, Sequence, Value

    text = {"prompt_id": Value("string"), "prompt": Value("string")}
    grouped = {**text, "image": Sequence(Image()), "rank": Sequence(Value("int8"))}
    columns = {"prompt_id": ["1"], "prompt": ["p"], "image": [embedded(A, B, C)], "rank": [[2, 1, 2]]}
    assert [pairs(one) for one in open_source(saved(tmp_path / "groups", grouped, **columns))] == [
        ("p", [(B, A), (B, C)])
    ]
    columns = {"prompt_id": ["1"], "prompt": ["p"], "img_better": embedded(A), "img_worse": embedded(B)}
    features = datasets.Features({**text, "img_better": Image(), "img_worse": Image()})
    pair = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=pair, test=pair).save_to_disk(tmp_path / "pairs")
    source = open_source(tmp_path / "pairs")
    assert [pairs(one) for one in source] == [("p", [(A, B)])]
    assert source.notices() == ["split train is read, test not (--split chooses)"]


def test_columns_that_say_no_preference(hf_cache, tmp_path):
    from datasets import Image, Value

    features = {"image": Image(), "rank": Value("int8"), "prompt": Value("string")}
    folder = saved(tmp_path / "set", features, image=embedded(A, B), rank=[1, 2], prompt=["p", "q"])
    assert [one.caption for one in open_source(folder)] == ["p", "q"]
    assert "its columns do not say which image is better (image, rank, prompt)" in refused(folder, "preferences")


def test_other_labels_are_another_source(hf_cache, tmp_path):
    from datasets import Value

    kinds = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "label_1": "float64"}
    features = {name: Value(kind) for name, kind in kinds.items()}
    columns = {"caption": ["p"], "jpg_0": [A], "jpg_1": [B]}
    found = [
        open_source(saved(tmp_path / str(label), features, **columns, label_0=[label], label_1=[1 - label]))
        for label in (0.0, 1.0)
    ]
    assert found[0].fingerprint() != found[1].fingerprint()
