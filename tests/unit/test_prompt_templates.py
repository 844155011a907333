"""Words around captions, and unconditional prompts that are not the empty caption, from tokenizing to drawing."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_cca.data.pairing import training_order
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.data.tokenizers import open_text_tokenizer, text_tokenizer_of, train_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.generation.prompts import Prompt, caption_ids, negative_ids
from megatron_cca.generation.shard_prompts import ShardPrompts
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.models.image_vocabulary import PromptTemplate

CAPTIONS = ["a red fox", "two zebras", "the sea at night", "a hat"]
BLANK = 321


@dataclasses.dataclass(frozen=True)
class Templated(type(tiny_vocabulary())):
    """Emu3's grammar with two ids of control more, which captions may have."""

    template: PromptTemplate | None = None

    @property
    def caption_size(self):
        return self.text_size + 2


def vocabulary(template):
    fields = dataclasses.asdict(tiny_vocabulary())
    return Templated(**fields, template=template)


BLANKED = vocabulary(PromptTemplate("<|user|>:", "\n:", blank=BLANK))
WORDED = vocabulary(PromptTemplate("draw:", " now", unconditional="anything"))


@pytest.fixture(scope="module")
def text():
    """A tokenizer that knows ``<|user|>`` as an added token."""
    whole = json.loads(train_tokenizer(CAPTIONS, 320).to_str())
    token = {"id": 320, "content": "<|user|>", "special": True}
    whole["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False})
    return text_tokenizer_of(Tokenizer.from_str(json.dumps(whole)))


def shards(folder, kind, text):
    samples = (
        Sample(np.full((1, 2, 2), place), np.array(text.encode_caption(caption, kind.template)))
        for place, caption in enumerate(CAPTIONS)
    )
    write_shards(folder, samples, kind, text.encode, text.save)
    return folder


def test_a_caption_has_the_ids_of_the_whole_text(text):
    """As one text, with the added token as such. In a caption its name is plain text."""
    whole = Tokenizer.from_str(next(iter(text.files.values())).decode())
    ids = text.encode_caption(" a red fox ", BLANKED.template)
    assert ids == whole.encode("<|user|>: a red fox\n:").ids
    user = whole.token_to_id("<|user|>")
    assert ids[0] == user
    assert text.decode_caption(ids, BLANKED.template) == "a red fox"
    assert user not in text.encode_caption("<|user|>", WORDED.template)
    assert text.encode_caption("a hat", None) == text.encode("a hat")


@pytest.mark.parametrize("kind", [BLANKED, WORDED])
def test_training_and_drawing_have_the_same_prompts(kind, text, tmp_path):
    folder = shards(tmp_path / "shards", kind, text)
    data = TokenData([TokenShards(folder, kind)])
    prompts = ShardPrompts(folder, kind, keeps_grids=False)
    for place, caption in enumerate(CAPTIONS):
        drawn = caption_ids(kind, open_text_tokenizer(folder), Prompt(caption))
        assert data.caption(place).tolist() == drawn.tolist() == list(prompts[place].ids)
        assert prompts[place].text == caption
        dropped = negative_ids(kind, text, "", len(drawn))
        assert data.dropped_caption(place).tolist() == dropped.tolist()
        assert dropped.tolist() == ([BLANK] * len(drawn) if kind is BLANKED else text.encode("anything"))
    assert negative_ids(WORDED, text, "ugly", 7).tolist() == text.encode_caption("ugly", WORDED.template)


@pytest.mark.parametrize("kind", [BLANKED, WORDED])
def test_both_rows_of_a_dropped_pair_have_the_unconditional_prompt(kind, text, tmp_path, builder_of):
    """Rows by hand: what the vocabulary writes for the sample's own dropped caption."""
    data = TokenData([TokenShards(shards(tmp_path / "shards", kind, text), kind)])
    builder = builder_of(data, condition_dropout=0.5)
    seen = set()
    for step in range(4):
        batch, plan = builder.pairing.at(step), builder.plan(step)
        rows = builder.sequences(plan, 0, 1).reshape(-1, 2, builder.micro_batch_size, plan.seq_length + 1)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            part, place = divmod(row, builder.micro_batch_size)
            dropped = bool(batch.condition_dropped[row])
            seen.add(dropped)
            own = text.encode_caption(CAPTIONS[sample], kind.template)
            if dropped:
                own = [BLANK] * len(own) if kind is BLANKED else text.encode("anything")
            meta = text.encode("2*2")
            wanted = [kind.bos, *own, kind.boi, *meta, kind.img, *kind.image(np.full((1, 2, 2), sample)).tolist()]
            assert rows[part, 0, place, : len(wanted)].tolist() == wanted
            assert (rows[part, 0, place, len(wanted) :] == kind.pad).all()
            if dropped:
                assert rows[part, 1, place].tolist() == rows[part, 0, place].tolist()
    assert seen == {True, False}


@pytest.fixture
def builder_of():
    from megatron_cca.data.microbatches import BatchBuilder
    from megatron_cca.data.pairing import Pairing

    def build(data, condition_dropout):
        order = training_order(data, 1, 0.0, 0)
        pairing = Pairing(order, data.rows, 4, condition_dropout, seed=1)
        return BatchBuilder(data, pairing, True, 2, 8, 128)

    return build


def test_shards_of_other_words_are_refused(text, tmp_path):
    folder = shards(tmp_path / "shards", WORDED, text)
    with pytest.raises(UserError, match="vocabulary"):
        TokenShards(folder, BLANKED)


def test_a_damaged_entry_is_refused(text, tmp_path):
    folder = shards(tmp_path / "shards", WORDED, text)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"unconditional": ["a"]}))
    with pytest.raises(UserError, match="unconditional: must be a list of token ids"):
        TokenShards(folder, WORDED)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"unconditional": [9999]}))
    with pytest.raises(UserError, match="unconditional has token 9999"):
        TokenShards(folder, WORDED)
