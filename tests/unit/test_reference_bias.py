"""What tools/measure_reference_bias.py says, against the same sums taken plainly, and against the gate of training."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.errors import UserError
from megatron_cca.lab.reference_bias import BiasSettings, ModelPrecision
from megatron_cca.lab.reference_bias import measure as bias
from megatron_cca.models.emu3 import tiny_vocabulary
from megatron_cca.training.log_ratio_gate import LogRatioSpread, check_log_ratio
from tests.distributed.launch import ROOT, run_tool, run_workers
from tests.references import token_shards

LENGTHS = [1, 5, 20, 24]
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.init_method_std=0.3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 24 to 42 tokens."""
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(128, size=(rows, 6)), random.integers(320, size=1 + rows), str(rows % 3))
        for rows in (4, 7, 5, 6, 4, 7)
    ]
    return token_shards.write(tmp_path_factory.mktemp("bias") / "shards", samples)


@pytest.fixture(scope="module")
def asked(data, tmp_path_factory):
    return BiasSettings(
        checkpoint=str(tmp_path_factory.mktemp("model") / "random"),
        data=str(data),
        rows=8,
        lengths=LENGTHS,
        precisions=["fp32", "bf16"],
        seed=3,
    )


@pytest.fixture(scope="module")
def answer(asked, tmp_path_factory):
    settings = {**vars(asked), "overrides": MODEL}
    return run_workers(1, "logits_workers.reference_bias", settings, tmp_path_factory.mktemp("rank"))


def ratios(answer, policy, reference, length):
    ours, theirs = (np.array(answer["plain"][name][str(length)]) for name in (policy, reference))
    return ours - theirs


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("pair", "names"),
    [
        ("fp32 / bf16", ("fp32", "bf16")),
        ("bf16 / fp32", ("bf16", "fp32")),
        ("fp32 / fp32 with FP8 weights", ("fp32", "fp32 rounded")),
        ("bf16 / bf16 with FP8 weights", ("bf16", "bf16 rounded")),
        ("bf16 / fp32 with FP8 weights", ("bf16", "fp32 rounded")),
    ],
)
def test_the_numbers_are_those_of_two_models_side_by_side(answer, pair, names, length):
    """Summed by the head of training, over the first tokens only; weights rounded by hand."""
    expected = ratios(answer, *names, length)
    mean, std, worst, rows = answer["measured"][pair][str(length)]
    # The plain sums, of up to 200 nats, are float32.
    near = {"rel": 1e-3, "abs": 1e-4}
    assert worst > 1e-3, "nothing was compared"
    assert rows == 8
    assert mean == pytest.approx(expected.mean(), **near)
    assert std == pytest.approx(expected.std(), **near)
    assert worst == pytest.approx(np.abs(expected).max(), **near)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_against_itself_is_exactly_zero(answer, precision):
    assert {tuple(row[:3]) for row in answer["measured"][f"{precision} / {precision}"].values()} == {(0.0, 0.0, 0.0)}


def test_the_zero_is_measured(answer):
    """The reference is a second model: layers that answer 0.25 higher at every run are found out."""
    assert answer["shaky"] == pytest.approx(-0.25)


def test_no_two_models_stand_side_by_side(answer):
    """Two policies and four references, and each is gone when the next one runs."""
    assert answer["lives"] == [[False] * number for number in range(6)]


def test_the_head_by_token_is_a_dense_log_softmax(answer):
    assert answer["token by token"]["dtype"] == "torch.float32"
    assert answer["token by token"]["error"] < 1e-4


def test_rows_are_pairs_and_end_with_their_image(asked, answer):
    config, vocabulary = bias._config(asked), tiny_vocabulary()
    rows = bias.training_rows(config, bias._open(config, asked.data))
    assert len(rows) == asked.rows
    for positive, negative in zip(rows[::2], rows[1::2], strict=True):
        assert positive.targets[positive.mask].tolist() == negative.targets[negative.mask].tolist()
        assert positive.tokens[0, :4].tolist() != negative.tokens[0, :4].tolist()
        for row in (positive, negative):
            assert row.tokens[0, 0] == vocabulary.bos
            assert row.mask[0, -1] and vocabulary.is_visual(row.targets[0, -1])
            assert row.tokens[0, 1:].tolist() == row.targets[0, :-1].tolist()
    multiple = replace(config, data=replace(config.data, pad_to_multiple_of=16))
    for long, short in zip(bias.training_rows(multiple, bias._open(config, asked.data)), rows, strict=True):
        assert long.tokens.size(1) == math.ceil(short.tokens.size(1) / 16) * 16
        assert long.mask.sum() == short.mask.sum()


def test_default_lengths_are_powers_of_two_and_the_whole_image():
    assert bias._lengths(None, 16) == [16]
    assert bias._lengths(None, 256) == [256]
    assert bias._lengths(None, 8100) == [256, 512, 1024, 2048, 4096, 8100]
    assert bias._lengths(None, 10_000) == [256, 512, 1024, 2048, 4096, 8192, 10_000]
    assert bias._lengths([20, 3, 20], 24) == [3, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [5, 25]}, "--lengths: 25 is not between 1 and 24"),
        ({"lengths": [0, 5]}, "--lengths: 0 is not between 1 and 24"),
        ({"precisions": ["bf16", "fp8-blockwise"]}, "--precisions: fp8-blockwise: fp8 needs a GPU"),
        ({"precisions": ["fp8-delayed"]}, "--precisions: fp8-delayed: unknown; known: fp32, bf16, fp8-tensorwise, fp8"),
        ({"rows": 7}, "--rows: must be even"),
        ({"rows": 0}, "--rows: must be 2 or more, found 0"),
        ({"rows": 14}, "--rows: 14 rows need 7 images"),
        ({"checkpoint": "nowhere"}, "--checkpoint: no checkpoint at nowhere"),
        ({"data": "nowhere"}, "--data: "),
    ],
)
def test_bad_input_is_one_line(asked, answer, change, message):
    with pytest.raises(UserError) as caught:
        bias.measure(replace(asked, **change))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_data_of_another_vocabulary_are_refused(asked, answer, tmp_path):
    codes = Sample(np.zeros((4, 6), dtype=int), np.arange(3))
    write_shards(tmp_path / "other", [codes] * 4, tiny_vocabulary(codebook_size=64), token_shards.encode_text)
    with pytest.raises(UserError, match=r"--data: .*tokenized for another vocabulary"):
        bias.measure(replace(asked, data=str(tmp_path / "other")))


def test_what_this_machine_lacks_is_left_out_and_said(asked, answer, capsys):
    assert bias._precisions(bias._config(asked), None) == ["fp32", "bf16"]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is left out: ")[0] for line in said] == ["fp8-tensorwise", "fp8-blockwise"]


def bias_of(rms, tokens=8192, fp8_param=True, policy="bf16"):
    spread = LogRatioSpread(mean=0.6 * rms, std=0.8 * rms, worst=3 * rms, rows=32)
    return bias.PairBias(ModelPrecision(policy), ModelPrecision("bf16", fp8_param), tokens, spread)


@pytest.mark.parametrize("rms", [1e-3, 0.37, 12.3, 4.1e4])
def test_the_beta_that_it_calls_safe_passes_the_gate_of_training(rms):
    config = load_config(None, ["training.precision=bf16", "reference.fp8_param=true"])
    pair = bias_of(rms)

    def judged(beta):
        return check_log_ratio(replace(config, objective=replace(config.objective, beta=beta)), pair.spread)

    judged(float(bias._beta(pair.safe_beta)))
    judged(pair.safe_beta * 0.999)
    with pytest.raises(UserError):
        judged(pair.safe_beta * 1.001)
    assert float(bias._beta(pair.safe_beta)) > 0.89 * pair.safe_beta


def test_the_sentences():
    pairs = [bias_of(1.0, 256), bias_of(12.4), bias_of(0.0, 256, False), bias_of(0.0, 8192, False)]
    assert bias.conclusions(pairs, None) == [
        "bf16 policy, bf16 reference with FP8 weights: safe up to beta 0.004 at 8,192 tokens (the paper's, scaled to "
        "that: 0.0014, is safe)",
        "bf16 policy, bf16 reference: exactly 0, safe at any beta",
    ]
    assert bias.conclusions(pairs, 0.0041)[0].endswith("(0.0041 is not safe)")
    assert bias.conclusions(pairs, 0.004)[0].endswith("(0.004 is safe)")
    uneven = [bias_of(0.1, 256, False), bias_of(0.0, 8192, False)]
    assert bias.conclusions(uneven, None)[0].endswith("not deterministic here")
    lines = bias.table(pairs).splitlines()
    assert lines[2] == "| bf16 | bf16 with FP8 weights | 256 | 0.6 | 0.8 | 1 | 3 | 0.05 |"
    assert lines[4].count("exactly 0") == 4
    assert len(lines) == 5


def test_the_picture_has_each_two_once_and_no_zeros():
    other = bias_of(3.0, policy="fp32", fp8_param=False)
    mirrored = replace(other, policy=other.reference, reference=other.policy)
    drawn = bias._lines([bias_of(2.0), bias_of(0.0, fp8_param=False), other, mirrored])
    assert drawn == [[other], [bias_of(2.0)]]


def test_the_program_prints_and_writes(asked, answer, digit_shards, tmp_path):
    (tmp_path / "runs" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "data" / "digits").symlink_to(digit_shards)
    options = ["--checkpoint", asked.checkpoint, "--data", "digits", "--rows", "4", "--beta", "1e-9"]
    options += ["--lengths", "8", "16", "--output", "found.json"]
    done = run_tool(ROOT / "tools" / "measure_reference_bias.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| fp32 | fp32 | all | exactly 0 |" in done.stdout
    assert "bf16 policy, bf16 reference with FP8 weights: safe up to beta " in done.stdout
    assert done.stdout.count("(1e-09 is safe)") == 6
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["rows"], found["data"], found["allowed"]) == (4, "digits", 0.05)
    assert len(found["pairs"]) == 2 * 4 * 2
    for pair in found["pairs"]:
        assert pair["root_mean_square"] == pytest.approx(math.hypot(pair["mean"], pair["std"]))
        if pair["policy"] == pair["reference"]:
            assert (pair["worst"], pair["safe_beta"]) == (0.0, None)
        else:
            assert pair["safe_beta"] * pair["root_mean_square"] == pytest.approx(0.05)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".found*"))
