"""tools/generate.py: what it writes, from which checkpoints, and what it refuses in one line."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_cca.checkpoint.huggingface import export_checkpoint, import_checkpoint
from tests.distributed.launch import ROOT, ended, run_tool, run_workers, start_job, torchrun
from tests.distributed.test_layout_parity import PP2, TP2
from tests.references import tiny_clip
from tests.references.huggingface import save_emu3

TOOL = ROOT / "tools" / "generate.py"


def generate(*arguments, cwd):
    return run_tool(TOOL, "--device", "cpu", *arguments, cwd=cwd)


def rows(folder):
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_writes_pictures_codes_prompts_and_the_evaluators_npz(checkpoint, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a handwritten seven", "label": 7, "seed": 11}\n{"prompt": "sept", "label": 7}\n')
    done = generate(
        "--checkpoint", checkpoint, "--prompts", prompts, "--images-per-prompt", 3, "--output", "drawn", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("wrote drawn: 6 images, 1 forward pass a token, ")
    folder = tmp_path / "drawn"
    names = {path.name for path in folder.iterdir()}
    assert names == {"images", "prompts.jsonl", "codes.npy", "settings.json", "sheet.png", "samples.npz"}
    found = rows(folder)
    assert [row["prompt"] for row in found] == ["a handwritten seven"] * 3 + ["sept"] * 3
    assert [row["seed"] for row in found] == [11, 12, 13, 3, 4, 5]
    pictures = [np.asarray(Image.open(folder / row["file"])) for row in found]
    archive = np.load(folder / "samples.npz")
    assert archive["arr_0"].dtype == np.uint8
    assert np.array_equal(archive["arr_0"], np.stack(pictures))
    assert archive["arr_1"].tolist() == [7] * 6
    assert decoded(checkpoint, np.load(folder / "codes.npy")) == np.stack(pictures).tolist()
    assert json.loads((folder / "settings.json").read_text())["forwards_per_token"] == 1


def decoded(checkpoint, codes):
    from megatron_cca.data.tokenizers import open_image_tokenizer

    config = json.loads(next(iter(_summaries(checkpoint))).read_text())["config"]
    images = open_image_tokenizer(config["data"]["path"]).decode(torch.from_numpy(codes.astype(np.int64)))
    return images.numpy().tolist()


def _summaries(checkpoint):
    from pathlib import Path

    return Path(checkpoint).glob("checkpoints/iter_*/checkpoint.json")


@pytest.fixture(scope="module")
def drawn(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    done = generate("--checkpoint", checkpoint, *PROMPT, "--output", "one", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "one"


PROMPT = [
    "--caption",
    "a handwritten seven",
    "--images-per-prompt",
    "5",
    "--guidance-scale",
    "0.5",
    "--batch-size",
    "2",
]


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "1"],
        ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"],
    ],
    ids=["DP 2", "PP 2"],
)
def test_ranks_draw_the_same_as_one_process(layout, checkpoint, drawn, tmp_path):
    arguments = ["--device", "cpu", "--checkpoint", checkpoint, *PROMPT, "--output", "two", *layout]
    jobs = start_job(2, TOOL, *arguments, cwd=tmp_path)
    assert ended(jobs) == [0, 0], (tmp_path / "rank0.err").read_text()
    assert_same_images(tmp_path / "two", drawn)


@pytest.mark.full
def test_torchrun_draws_the_same_with_tensor_parallelism_over_all_ranks(checkpoint, drawn, tmp_path):
    done = torchrun(2, TOOL, "--device", "cpu", "--checkpoint", checkpoint, *PROMPT, "--output", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_images(tmp_path / "two", drawn)


def assert_same_images(one, other):
    assert np.array_equal(np.load(one / "codes.npy"), np.load(other / "codes.npy"))
    assert rows(one) == rows(other)


def test_best_of_keeps_what_the_scorer_likes(checkpoint, tmp_path):
    (tmp_path / "ink.py").write_text("def dark(images, prompts):\n    return -images.mean(axis=(1, 2, 3))\n")
    common = ["--checkpoint", checkpoint, "--caption", "a handwritten one", "--images-per-prompt", 4, "--no-npz"]
    assert generate(*common, "--output", "one", cwd=tmp_path).returncode == 0
    best = ["--best-of", 6, "--scorer", "ink.py:dark", "--output", "best"]
    done = generate(*common, *best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    means = [pictures(tmp_path / name).mean(axis=(1, 2, 3)) for name in ("one", "best")]
    # The first candidate is the one that would have been drawn without.
    assert (means[1] <= means[0]).all()
    assert means[1].mean() < means[0].mean()
    assert [row["score"] for row in rows(tmp_path / "best")] == pytest.approx((-means[1]).tolist())
    assert not (tmp_path / "best" / "samples.npz").exists()
    assert json.loads((tmp_path / "best" / "settings.json").read_text())["scorer"] == "ink.py:dark"


def test_prompts_that_the_scorer_reads_in_part_are_said(checkpoint, tmp_path):
    clip = tmp_path / "clip"
    clip.mkdir()
    (tmp_path / "prompts.txt").write_text("# a seven\na seven\na handwritten seven of a pen\n")
    best = ["--best-of", 2, "--scorer", f"clip:{tiny_clip.save(clip)}", "--output", "best"]
    done = generate("--checkpoint", checkpoint, "--prompts", "prompts.txt", *best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = "--scorer: 1 of 3 prompts are longer than the 20 tokens that this CLIP reads; their ends are not scored"
    assert said in done.stderr
    assert '--prompts: 1 of 3 prompts begin with "#" and are drawn as all others' in done.stderr
    assert json.loads((tmp_path / "best" / "settings.json").read_text())["scorer_prompts_cut"] == 1


def test_the_sheet_shows_images_of_the_whole_list():
    from megatron_cca.generation.sampling_job import sheet_indices

    assert sheet_indices(2) == [0, 1]
    assert sheet_indices(16) == list(range(16))
    assert (sheet_indices(200)[0], sheet_indices(200)[-1], len(set(sheet_indices(200)))) == (0, 199, 16)


def test_a_former_output_loses_first_what_says_that_it_is_whole(tmp_path, monkeypatch):
    from megatron_cca.generation import sampling_job

    (tmp_path / "images").mkdir()
    (tmp_path / "settings.json").write_text("{}")

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling_job.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        sampling_job._move_into_place(tmp_path / ".partial", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def pictures(folder):
    return np.stack([np.asarray(Image.open(folder / row["file"])) for row in rows(folder)]).astype(float)


@pytest.mark.parametrize("form", ["Emu3ForCausalLM", "transformers"])
def test_hugging_face_folders_have_the_logits_of_transformers(form, tmp_path):
    from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration

    folder = save_emu3(tmp_path / "hf", form)
    cls = Emu3ForCausalLM if form == "Emu3ForCausalLM" else Emu3ForConditionalGeneration
    tokens = torch.randint(0, 456, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = cls.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=tokens).logits[..., 328:]
    save_file({"tokens": tokens, "logits": logits.contiguous()}, tmp_path / "expected.safetensors")
    settings = {"folder": str(folder), "expected": str(tmp_path / "expected.safetensors")}
    found = run_workers(1, "logits_workers.huggingface_logits", {**settings, "layouts": {"one": []}}, tmp_path)
    layouts = {"TP 2": TP2, "PP 2": PP2}
    found |= run_workers(2, "logits_workers.huggingface_logits", {**settings, "layouts": layouts}, tmp_path)
    assert max(found.values()) < 1e-5 * logits.abs().max(), found


def test_an_import_keeps_all_that_drawing_takes(tmp_path):
    """Emu3 in transformers' form: text and image tokenizer come along, so that both folders draw without more."""
    folder = save_emu3(tmp_path / "hf", "transformers")
    import_checkpoint(folder, tmp_path / "megatron", progress_bar=False)
    for name in ("hf", "megatron"):
        arguments = [
            "--checkpoint",
            name,
            "--caption",
            "a handwritten seven",
            "--grid",
            "3",
            "5",
            "--output",
            f"{name}_out",
        ]
        done = generate(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(pictures(tmp_path / "hf_out"), pictures(tmp_path / "megatron_out"))
    assert pictures(tmp_path / "hf_out").shape == (1, 3, 5, 3)
    assert np.load(tmp_path / "hf_out" / "codes.npy").shape == (1, 3, 5)


def test_what_is_exported_draws_the_same_in_plain_transformers(checkpoint, tmp_path):
    """The documentation's lines, on the digits: greedy codes of transformers are those of the training checkpoint."""
    export_checkpoint(checkpoint, tmp_path / "exported", progress_bar=False)
    arguments = ["--checkpoint", checkpoint, "--classes", "all", "--class-captions", "classes.txt", "--temperature", 0]
    (tmp_path / "classes.txt").write_text("a handwritten seven\nthe digit one\na scan of a three\n")
    done = generate(*arguments, "--output", "drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    code = documented_lines().replace("Emu3-Gen-CCA", "exported")
    for emu3, digits in (("90, 90", "4, 4"), ("151846", "321"), ("151854, 184622", "328, 456")):
        assert emu3 in code
        code = code.replace(emu3, digits)
    told = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(told):
        exec(code, {})  # noqa: S102 - our own documentation
    assert told.getvalue().splitlines()[-1] == "3 of 3 images are the same"


def documented_lines():
    """The documentation's code block that generates with transformers."""
    blocks = (ROOT / "docs" / "sampling-and-evaluation.md").read_text(encoding="utf-8").split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if "prefix_allowed_tokens_fn" in block)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "checkpoint: no checkpoint at nowhere"),
        ({"--images-per-prompt": "0"}, "--images-per-prompt: must be 1 or more, found 0"),
        ({"--guidance-scale": "-1"}, "guidance scale: must be 0 or more and finite, found -1.0"),
        ({"--guidance-scale": "nan"}, "guidance scale: must be 0 or more and finite, found nan"),
        ({"--caption": "seven " * 100}, "prompt 'seven seven"),
        ({"--grid": "40 40"}, "grid 40*40: takes "),
        ({"--grid": "0 4"}, "--grid: height and width must be 1 or more, found 0 4"),
        ({"--best-of": "3"}, "--best-of: goes with --scorer"),
        ({"--best-of": "3", "--scorer": "ink"}, "--scorer: 'ink' is none of clip:FOLDER, pickscore:FOLDER, hpsv2:FILE"),
        ({"--best-of": "3", "--scorer": "no.py:ink"}, "--scorer: the file no.py does not exist"),
        (
            {"--pipeline-model-parallel-size": "2"},
            "--pipeline-model-parallel-size: tensor size 1 x pipeline size 2 does not divide the 1 processes of this "
            "job; start a multiple of 2",
        ),
        ({"--tensor-model-parallel-size": "2"}, "--tensor-model-parallel-size: tensor size 2 x pipeline size 1 does"),
        ({"--tensor-model-parallel-size": "0"}, "--tensor-model-parallel-size: must be 1 or more, found 0"),
        ({"--negative-prompt": "ugly"}, "--negative-prompt: of no use without --guidance-scale or --contrastive-top-k"),
        ({"--guidance-scale": "1e308"}, "the model's logits are not finite numbers"),
        ({"--caption": "a \udcff"}, r"prompt 'a \udcff': a lone surrogate"),
        ({"--text-tokenizer": "nowhere"}, "--text-tokenizer: nowhere holds no text tokenizer"),
        ({"--image-tokenizer": "nowhere"}, "--image-tokenizer: no file or folder at nowhere"),
    ],
)
def test_it_refuses_in_one_line(change, message, checkpoint, tmp_path):
    arguments = {"--checkpoint": checkpoint, "--caption": "a", "--output": "drawn", **change}
    words = [
        word for name, value in arguments.items() for word in (name, *(value.split() if name == "--grid" else [value]))
    ]
    done = generate(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"megatron_cca: error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_classes_and_foreign_outputs_are_refused(checkpoint, tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    common = ["--checkpoint", checkpoint, "--output"]
    for arguments, message in (
        (["drawn", "--classes", "all"], "--classes: this model's classes are not known; say them in --class-captions"),
        (
            ["drawn", "--classes", "c", "--class-captions", "classes.txt"],
            "--classes: 'c' is no class; there are 2: 0 to 1",
        ),
        (["full", "--caption", "a"], "--output: full already holds thesis.tex; give an empty folder or --overwrite"),
        (
            ["full", "--caption", "a", "--overwrite"],
            "--output: full holds thesis.tex: not what --overwrite is meant to",
        ),
    ):
        done = generate(*common, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
        assert done.stderr.startswith(f"megatron_cca: error: {message}"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.txt", "full"]


def test_a_model_whose_image_tokens_are_not_known_is_refused(tmp_path):
    import_checkpoint(save_emu3(tmp_path / "hf", "Emu3ForCausalLM", vocab_size=1000), tmp_path / "megatron")
    done = generate("--checkpoint", "megatron", "--caption", "a", "--output", "drawn", cwd=tmp_path)
    assert done.returncode == 2
    assert "has a vocabulary of 1000, whose image tokens are not known; nothing can be drawn with it" in done.stderr
