"""tools/generate.py --shards: codes, captions and conditions as training data, the same however the job is run."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.checkpoint.summary import recorded_fingerprint
from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.data.shards import TokenShards
from megatron_cca.data.tokenizers import TOKENIZER_FILE, open_image_tokenizer, open_text_tokenizer
from megatron_cca.models import resolve_architecture
from megatron_cca.models.emu3 import tiny_vocabulary
from tests.distributed.launch import SCRIPT, ended, run_tool, run_workers, start_job, start_tool
from tests.distributed.test_generate_tool import ROOT, TOOL, generate
from tests.distributed.test_layout_parity import CCA, under
from tests.references.drawn_digits import shards_of_digits
from tests.references.huggingface import save_emu3

TOKENIZE = ROOT / "tools" / "tokenize_images.py"
TEXTS = ["a handwritten seven", "the digit one", "", "a scan of a three", "the digit one"]
NAMES = ["digit 7", "digit 1", None, "digit 3", None]
SAMPLES, TIMES = 30, 2
VAR, LLAMAGEN = (["model.name=var-tiny"], ["model.name=llamagen-tiny", "model.num_layers=2"])


def vocabulary_of(overrides):
    return resolve_architecture(load_config(None, overrides).model).vocabulary


@pytest.fixture(scope="module")
def source(digit_shards, tmp_path_factory):
    """Shards of two grids, of captions of several lengths and none, of named conditions and unnamed ones."""
    text = open_text_tokenizer(digit_shards)
    random = np.random.default_rng(0)
    samples = (
        Sample(
            random.integers(128, size=(1, 2, 3) if place % 4 == 1 else (1, 4, 4)),
            np.array(text.encode(TEXTS[place % 5]), dtype=np.int64),
            NAMES[place % 5],
        )
        for place in range(SAMPLES)
    )
    folder = tmp_path_factory.mktemp("source") / "real"
    write_shards(folder, samples, tiny_vocabulary(), text.encode, text.save)
    return folder


@pytest.fixture(scope="module")
def options(checkpoint, source):
    given = ["--checkpoint", checkpoint, "--like", source, "--images-per-prompt", TIMES, "--seed", 3]
    return [*given, "--guidance-scale", "0.5", "--top-k", "40", "--batch-size", "4", "--block", "8"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = generate(*options, "--shards", "drawn", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("wrote drawn: 60 samples, 2 forward passes a token, ")
    assert done.stdout.endswith(" images/s\n")
    assert [path.name for path in folder.iterdir()] == ["drawn"]
    return folder / "drawn"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def notes(folder):
    return [json.loads(line) for line in (folder / "drawn.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_drawn_sample_has_caption_condition_and_grid_of_its_real_one(whole, source):
    real, drawn = (TokenShards(folder, tiny_vocabulary()) for folder in (source, whole))
    assert len(drawn) == SAMPLES * TIMES
    for name in ("caption", "caption_length", "condition", "grid"):
        assert np.array_equal(drawn.table[name], np.repeat(real.table[name], TIMES, axis=0)), name
    for place in range(len(drawn)):
        assert np.array_equal(drawn.caption(place), real.caption(place // TIMES))
    assert drawn.manifest["meta_words"] == real.manifest["meta_words"]
    assert [note["sample"] for note in notes(whole)] == [place // TIMES for place in range(len(drawn))]
    assert [note["prompt"] for note in notes(whole)] == [TEXTS[place // TIMES % 5] for place in range(len(drawn))]


def test_the_codes_are_those_that_pictures_of_the_same_prompts_have(whole, checkpoint, tmp_path):
    """The way through text, one picture of the folder's at a time, in other batches."""
    drawn = TokenShards(whole, tiny_vocabulary())
    square = [place for place in range(len(drawn)) if drawn.table[place]["grid"][1] == 4]
    lines = [{"prompt": notes(whole)[place]["prompt"], "seed": notes(whole)[place]["seed"]} for place in square]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--checkpoint", checkpoint, "--guidance-scale", "0.5", "--top-k", "40", "--no-npz"]
    done = generate(*common, "--prompts", "prompts.jsonl", "--output", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = np.load(tmp_path / "pictures" / "codes.npy")
    assert [drawn.codes(place)[0].tolist() for place in square] == codes.tolist()
    assert len({image.tobytes() for image in codes}) > len(codes) // 2


def test_the_manifest_says_what_they_were_drawn_with(whole, checkpoint, source, digit_shards, tmp_path):
    manifest = json.loads((whole / "manifest.json").read_text())
    drawn = manifest["drawn"]
    wanted = {"guidance_scale": 0.5, "top_k": 40, "temperature": 1.0, "top_p": 1.0, "seed": 3, "best_of": 1}
    assert {name: drawn[name] for name in wanted} == wanted
    folder = layout.resolve(checkpoint, "checkpoint")
    assert (drawn["checkpoint"], drawn["images_per_prompt"], drawn["precision"]) == (str(folder), TIMES, "fp32")
    assert drawn["weights"] == recorded_fingerprint(folder, "checkpoint")
    read = TokenShards(source, tiny_vocabulary()).fingerprint()
    assert drawn["prompts"] == {"--like": str(source), "fingerprint": read}
    assert manifest["image_tokenizer"]["fingerprint"] == open_image_tokenizer(digit_shards).fingerprint()
    assert open_image_tokenizer(whole).fingerprint() == open_image_tokenizer(digit_shards).fingerprint()
    assert (whole / TOKENIZER_FILE).read_bytes() == (digit_shards / TOKENIZER_FILE).read_bytes()
    # So that a tiny model of these codes can be trained on them alone.
    assert manifest["model"] == {"name": "emu3-tiny", "codebook_size": tiny_vocabulary().codebook_size}
    inspected = inspect(whole, tmp_path)
    assert "guidance_scale 0.5" in inspected


def inspect(folder, cwd):
    done = run_tool(TOKENIZE, "inspect", folder, "--device", "cpu", "--picture", "sheet.png", cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (cwd / "sheet.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout


@pytest.mark.parametrize(
    ("layout_of", "batch"),
    [(["--tensor-model-parallel-size", "1"], "4"), (["--tensor-model-parallel-size", "2"], "7")],
    ids=["DP 2", "TP 2, other batches"],
)
def test_two_processes_write_the_same_bytes(layout_of, batch, options, whole, tmp_path):
    arguments = [*options, *layout_of, "--batch-size", batch, "--device", "cpu", "--shards", "drawn"]
    jobs = start_job(2, TOOL, *arguments, cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    assert contents(tmp_path / "drawn") == contents(whole)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("rank")] == ["drawn"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_goes_on_where_it_was(number, options, whole, tmp_path):
    job = start_tool(TOOL, *options, "--device", "cpu", "--shards", "drawn", cwd=tmp_path, log=tmp_path / "log")
    parts = tmp_path / "drawn.parts"
    while len(list(parts.glob("0*"))) < 2 and job.is_alive():
        time.sleep(0.01)
    os.kill(job.pid, number)
    assert ended([job]) == [-number if number == signal.SIGKILL else 130]
    assert not (tmp_path / "drawn").exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("0*/part.json")}
    assert before
    refused = generate(*options, "--temperature", "0.5", "--shards", "drawn", cwd=tmp_path)
    assert refused.returncode == 2
    wanted = "megatron_cca: error: --shards: drawn.parts was begun with temperature 1.0, not 0.5; go on as it was begun"
    assert refused.stderr.startswith(wanted), refused.stderr
    assert {path: path.stat().st_mtime_ns for path in parts.glob("0*/part.json")} == before
    replicas = ["--device", "cpu", "--tensor-model-parallel-size", "1"]
    jobs = start_job(2, TOOL, *options, *replicas, "--shards", "drawn", cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    assert contents(tmp_path / "drawn") == contents(whole)
    assert not parts.exists()


def test_a_run_trains_on_drawn_shards_beside_real_ones_and_as_their_partners(source, whole, tmp_path):
    runs = {
        "alone": [*CCA, f"data.path={whole}"],
        "blend": [*CCA, f"data.path={{{source}: 0.5, {whole}: 0.5}}"],
        "partners": [*under("dpo"), f"data.path={source}", "data.pairs=images", f"data.partner_path={whole}"],
    }
    for name, run in runs.items():
        overrides = [*run, f"training.output_dir={tmp_path / name}"]
        found = run_workers(1, "checkpoint_workers.resume", {"overrides": overrides, "steps": 1}, tmp_path)
        assert np.isfinite(found["rows"][0]["loss"])


def test_ddo_takes_what_its_reference_drew_and_nothing_of_another_model(checkpoint, source, whole, tmp_path):
    run = [*under("ddo"), f"data.path={source}", "training.train_iters=2"]

    def train(number, *more):
        words = [word for one in [*run, *more] for word in ("--set", one)]
        return run_tool(SCRIPT, *words, "--set", f"training.output_dir={tmp_path}/{number}", cwd=tmp_path)

    drawn, own = f"data.partner_path={whole}", f"training.pretrained_checkpoint={checkpoint}"
    for step in (1, 2):
        done = train("own", drawn, own, f"training.train_iters={step}")
        assert done.returncode == 0, done.stderr
        assert "does not say" not in done.stdout
    other = f"training.pretrained_checkpoint={tmp_path}/own"
    done = train("other", drawn, other)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron_cca: error: data.partner_path: {whole} was drawn by weights ")
    assert done.stderr.count("\n") == 1
    write_shards(tmp_path / "real", drawn_again(whole), tiny_vocabulary(), open_text_tokenizer(source).encode)
    done = train("real", f"data.partner_path={tmp_path}/real", own)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("real does not say which weights drew it; ddo takes its images") == 1


def drawn_again(folder):
    shards = TokenShards(folder, tiny_vocabulary())
    return [Sample(shards.codes(place), shards.caption(place)) for place in range(len(shards))]


def test_the_best_of_several_is_written(checkpoint, tmp_path):
    (tmp_path / "ink.py").write_text("def dark(images, prompts):\n    return -images.mean(axis=(1, 2, 3))\n")
    common = ["--checkpoint", checkpoint, "--caption", "a handwritten one", "--images-per-prompt", 3]
    best = ["--best-of", 4, "--scorer", "ink.py:dark"]
    assert generate(*common, "--shards", "one", cwd=tmp_path).returncode == 0
    assert generate(*common, *best, "--output", "pictures", "--no-npz", cwd=tmp_path).returncode == 0
    done = generate(*common, *best, "--shards", "best", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one, kept = (TokenShards(tmp_path / name, tiny_vocabulary()) for name in ("one", "best"))
    codes = np.stack([kept.codes(place)[0] for place in range(3)])
    assert codes.tolist() == np.load(tmp_path / "pictures" / "codes.npy").tolist()
    assert codes.tolist() != [one.codes(place)[0].tolist() for place in range(3)]
    images = open_image_tokenizer(tmp_path / "best").decode(torch.from_numpy(codes.astype(np.int64))).numpy()
    scores = [note["score"] for note in notes(tmp_path / "best")]
    assert scores == pytest.approx((-images.mean(axis=(1, 2, 3))).tolist())
    manifest = json.loads((tmp_path / "best" / "manifest.json").read_text())
    assert (manifest["drawn"]["best_of"], manifest["drawn"]["scorer"]) == (4, "ink.py:dark")


@pytest.mark.parametrize("model", [LLAMAGEN, VAR], ids=["LlamaGen", "VAR"])
def test_models_of_classes_draw_their_own_data(model, tmp_path):
    vocabulary = vocabulary_of(model)
    digits = shards_of_digits(vocabulary, tmp_path / "digits")
    run = [*model, "training.global_batch_size=4", "training.micro_batch_size=4"]
    steps = {"overrides": [*run, f"data.path={digits}", f"training.output_dir={tmp_path}/run"], "steps": 1}
    run_workers(1, "checkpoint_workers.resume", {**steps, "save": True}, tmp_path)
    real = TokenShards(digits, vocabulary)
    few = [Sample(real.codes(place), real.caption(place), int(real.table[place]["condition"])) for place in range(9)]
    write_shards(tmp_path / "real", few, vocabulary, None)
    common = ["--checkpoint", "run", "--images-per-prompt", 2]
    labels = {"classes": [[label] for label in range(10)], "like": [sample.caption.tolist() for sample in few]}
    for name, asked in (("classes", ["--classes", "all"]), ("like", ["--like", "real"])):
        done = generate(*common, *asked, "--shards", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        drawn = TokenShards(tmp_path / name, vocabulary)
        captions = [drawn.caption(place).tolist() for place in range(len(drawn))]
        assert captions == [label for label in labels[name] for _ in range(2)]
        assert (drawn.table["grid"] == real.table["grid"][0]).all()
    assert np.array_equal(drawn.table["condition"], np.repeat(real.table["condition"][:9], 2))
    assert notes(tmp_path / "classes")[3] == {"prompt": "class 1", "label": 1, "seed": 3}
    inspect(tmp_path / "classes", tmp_path)
    for name in ("classes", "like"):
        steps = [
            *run,
            f"data.path={{{digits}: 0.5, {tmp_path / name}: 0.5}}",
            f"training.output_dir={tmp_path}/{name}_run",
        ]
        found = run_workers(1, "checkpoint_workers.resume", {"overrides": steps, "steps": 1}, tmp_path)
        assert np.isfinite(found["rows"][0]["loss"])


def test_shards_of_an_import_name_the_image_tokenizer_that_it_keeps(tmp_path):
    import_checkpoint(save_emu3(tmp_path / "hf", "transformers"), tmp_path / "megatron", progress_bar=False)
    weights = []
    for name in ("hf", "megatron"):
        asked = ["--caption", "a handwritten seven", "--grid", 3, 5, "--shards", f"{name}_drawn"]
        done = generate("--checkpoint", name, *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        inspect(tmp_path / f"{name}_drawn", tmp_path)
        weights.append(json.loads((tmp_path / f"{name}_drawn" / "manifest.json").read_text())["drawn"]["weights"])
    one, other = (TokenShards(tmp_path / name, tiny_vocabulary()) for name in ("hf_drawn", "megatron_drawn"))
    assert np.array_equal(one.codes(0), other.codes(0))
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "a", "--shards", "x", "--output", "y"], "--output: not allowed with argument --shards"),
        (["--caption", "a"], "one of the arguments --output --shards is required"),
        (["--like", "real", "--caption", "a", "--shards", "x"], "--caption: not allowed with argument --like"),
        (["--like", "real", "--output", "x"], "--like: of no use without --shards"),
        (["--caption", "a", "--block", "3", "--output", "x"], "--block: of no use without --shards"),
        (["--caption", "a", "--shards", "x", "--overwrite"], "--overwrite: of no use with --shards"),
        (["--caption", "a", "--shards", "x", "--no-npz"], "--no-npz: of no use with --shards"),
        (["--like", "real", "--prompt-suffix", "b", "--shards", "x"], "--prompt-suffix: of no use with --like, whose"),
        (["--caption", "a", "--shards", "real"], "--shards: real exists already; give another folder, or remove it"),
        (["--like", "real", "--shards", "real/x"], "--shards: real/x and --like real are in each other's way"),
        (["--like", "nowhere", "--shards", "x"], "--like: nowhere/manifest.json is missing; give a folder of token"),
        (["--like", "classes", "--shards", "x"], "--like: classes was tokenized for another vocabulary ("),
        (["--like", "clips", "--shards", "x"], "--like: clips holds clips, and images are drawn; say their --grid"),
        (["--like", "bare", "--shards", "x"], "--like: bare holds no text tokenizer: neither tokenizer.json nor"),
        (["--like", "foreign", "--shards", "x"], "--like: foreign has another text tokenizer than the model; give"),
        (["--like", "real", "--grid", "40", "40", "--shards", "x"], "grid 40*40: takes "),
        (["--caption", "a", "--image-tokenizer", "real", "--shards", "x"], "--image-tokenizer: real holds no image"),
    ],
)
def test_it_refuses_in_one_line(arguments, message, checkpoint, refused_folders, tmp_path):
    for path in refused_folders.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = sorted(tmp_path.iterdir())
    done = generate("--checkpoint", checkpoint, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"megatron_cca: error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def refused_folders(source, digit_shards, tmp_path_factory):
    """Shards that --like cannot take, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("refused")
    text = open_text_tokenizer(digit_shards)
    shutil.copytree(source, folder / "real")
    class_sample = Sample(np.zeros((1, 4, 4), np.int64), np.array([3]))
    write_shards(folder / "classes", [class_sample], vocabulary_of(LLAMAGEN), None)
    sample = Sample(np.zeros((1, 4, 4), np.int64), np.array(text.encode("a")))
    write_shards(folder / "bare", [sample], tiny_vocabulary(), text.encode)
    clip = Sample(np.zeros((2, 4, 4), np.int64), sample.caption)
    write_shards(folder / "clips", [clip], tiny_vocabulary(), text.encode, text.save)

    def save_other(partial):
        found = json.loads((digit_shards / TOKENIZER_FILE).read_text())
        ids = found["model"]["vocab"]
        found["model"]["vocab"] = dict(zip(ids, reversed(ids.values()), strict=True))
        (partial / TOKENIZER_FILE).write_text(json.dumps(found))

    write_shards(folder / "foreign", [sample], tiny_vocabulary(), text.encode, save_other)
    return folder
