"""Who made the partners: what ddo refuses and is told of, what others do not ask, and which tokenizers fit."""

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import IMPORTED_FROM, recorded_fingerprint
from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import merge_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.training.batches import open_data
from megatron_cca.training.drawn_partners import lines_on_undrawn
from tests.references.token_shards import VOCABULARY, encode_text, random_samples, write

START, REFERENCE = "training.pretrained_checkpoint", "reference.checkpoint"


@pytest.fixture
def checkpoints(tmp_path):
    """Two runs whose checkpoints have other weights; the second was imported from a folder ``hf``."""
    for name, weights, more in (("a", b"1", {}), ("b", b"2", {IMPORTED_FROM: {"folder": str(tmp_path / "hf")}})):
        root = tmp_path / name / layout.FOLDER
        partial = layout.partial_folder(root, 1)
        partial.mkdir(parents=True)
        (partial / "__0_0.distcp").write_bytes(weights)
        layout.finalize(partial, root, 1, more)
    return tmp_path


def fingerprint_of(run):
    return recorded_fingerprint(layout.resolve(run, "run"), "run")


def drawn_by(folder, weights, checkpoint):
    """Shards as ``generate --shards`` writes them."""
    part = write(folder / "parts" / str(weights), random_samples(40, captions=1))
    found = folder / f"drawn_by_{weights}"
    facts = {} if weights is None else {"drawn": {"weights": weights, "checkpoint": str(checkpoint)}}
    merge_shards(found, [part], VOCABULARY, encode_text, lambda _: None, facts, folder / "aside")
    return found


def settings(folder, partners, *more, objective="ddo"):
    data = folder / "data"
    if not data.exists():
        write(data, random_samples(40, captions=1))
    given = [f"objective.name={objective}", "data.pairs=images", f"data.path={data}", f"data.partner_path={partners}"]
    return load_config(None, ["model.name=emu3-tiny", *given, *more])


def refusal(config):
    with pytest.raises(UserError) as error:
        open_data(config)
    return str(error.value)


def test_partners_of_the_references_weights_are_taken(checkpoints):
    partners = drawn_by(checkpoints, fingerprint_of(checkpoints / "a"), "elsewhere")
    for own in ([f"{START}={checkpoints}/a"], [f"{START}={checkpoints}/b", f"{REFERENCE}={checkpoints}/a"]):
        config = settings(checkpoints, partners, *own)
        assert lines_on_undrawn(config, [open_data(config).training]) == []


def test_partners_of_other_weights_are_refused(checkpoints):
    own, other = (fingerprint_of(checkpoints / name) for name in ("a", "b"))
    partners = drawn_by(checkpoints, other, "runs/b")
    found = refusal(settings(checkpoints, partners, f"{START}={checkpoints}/a"))
    assert found == (
        f"data.partner_path: {partners} was drawn by weights {other} of runs/b, but the reference of ddo, which must "
        f"draw them, has weights {own} ({START}: {checkpoints}/a); draw with generate --checkpoint {checkpoints}/a, or "
        f"name in {START} the checkpoint that drew them"
    )
    wrong_reference = [f"{START}={checkpoints}/b", f"{REFERENCE}={checkpoints}/a"]
    assert f"({REFERENCE}: {checkpoints}/a)" in refusal(settings(checkpoints, partners, *wrong_reference))
    assert "has random weights; name that checkpoint in training.pretrained" in refusal(settings(checkpoints, partners))
    open_data(settings(checkpoints, partners, f"{START}={checkpoints}/a", objective="dpo"))


def test_partners_of_the_validation_are_asked_too(checkpoints):
    own, other = (fingerprint_of(checkpoints / name) for name in ("a", "b"))
    right, wrong = drawn_by(checkpoints, own, "a"), drawn_by(checkpoints, other, "b")
    validation = [f"validation.path={checkpoints}/data", f"validation.partner_path={wrong}"]
    found = refusal(settings(checkpoints, right, f"{START}={checkpoints}/a", *validation))
    assert found.startswith(f"validation.partner_path: {wrong} was drawn by weights {other} of b")


def test_partners_of_the_folder_that_the_reference_was_imported_from_are_taken(checkpoints):
    """Their files have other fingerprints."""
    partners = drawn_by(checkpoints, "0123456789abcdef", checkpoints / "hf")
    open_data(settings(checkpoints, partners, f"{START}={checkpoints}/b"))
    assert "was drawn by" in refusal(settings(checkpoints, partners, f"{START}={checkpoints}/a"))


def test_partners_that_name_no_weights_are_taken_and_told_of_once(checkpoints):
    partners = drawn_by(checkpoints, None, None)
    config = settings(checkpoints, partners, f"validation.path={checkpoints}/data")
    data = open_data(config)
    assert lines_on_undrawn(config, [data.training, data.validation]) == [
        f"data.partner_path: {partners} does not say which weights drew it; ddo takes its images for the "
        "reference's own"
    ]
    assert "drawn" not in TokenShards(partners, VOCABULARY).manifest


def made_with(folder, name, captions=1, **tokenizers):
    """Shards that name their tokenizers."""
    part = write(folder / "parts" / name, random_samples(40, seed=captions, captions=captions))
    facts = {f"{kind}_tokenizer": {"fingerprint": value} for kind, value in tokenizers.items()}
    merge_shards(folder / name, [part], VOCABULARY, encode_text, lambda _: None, facts, folder / "aside")
    return folder / name


def test_codes_of_another_image_tokenizer_are_refused(tmp_path):
    first, second, same = (made_with(tmp_path, name, image=name[0] * 4) for name in ("ab", "ba", "ac"))
    line = f"{second} has codes of another image tokenizer (bbbb) than {first} (aaaa); tokenize both with the same one"
    dpo = ["objective.name=dpo", "data.pairs=images", f"data.path={first}"]
    for key, given in {
        "data.partner_path": [*dpo, f"data.partner_path={second}"],
        "data.path": [f"data.path={{{first}: 1, {second}: 1}}"],
        "validation.path": [f"data.path={first}", f"validation.path={second}"],
    }.items():
        assert refusal(load_config(None, given)) == f"{key}: {line}"
    open_data(load_config(None, [*dpo, f"data.partner_path={same}"]))


def test_captions_of_another_text_tokenizer_are_named_where_no_condition_fits(tmp_path):
    first, second, third = (
        made_with(tmp_path, name, captions=index + 1, text=text)
        for index, (name, text) in enumerate([("a", "aaaa"), ("b", "bbbb"), ("c", "aaaa")])
    )
    dpo = ["objective.name=dpo", "data.pairs=images", f"data.path={first}"]
    assert refusal(load_config(None, [*dpo, f"data.partner_path={second}"])) == (
        f"data.partner_path: {second} has captions of another text tokenizer (bbbb) than {first} (aaaa); tokenize both "
        "with the same one"
    )
    assert "no image there has the condition" in refusal(load_config(None, [*dpo, f"data.partner_path={third}"]))


def test_pairs_of_the_data_itself_are_told_of_too(tmp_path):
    data = TokenData([TokenShards(made_with(tmp_path, "a"), VOCABULARY)])
    (line,) = lines_on_undrawn(load_config(None, ["objective.name=ddo", "data.path=a"]), [data])
    assert line.startswith(f"data.path: {tmp_path}/a does not say which weights drew it")
