"""tools/evaluate.py from its options to its files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cca.data.digits import captions_of, load_scans
from megatron_cca.errors import UserError
from megatron_cca.lab import reserved_folder
from megatron_cca.lab.evaluation import METRICS, ON_REQUEST, EvaluateOptions, FidelitySettings
from megatron_cca.lab.evaluation.checks import check, choose_metrics
from megatron_cca.lab.evaluation.clip import ClipScorer
from megatron_cca.lab.evaluation.extractors import open_extractor
from megatron_cca.lab.evaluation.fidelity import fidelity
from megatron_cca.lab.evaluation.image_sets import ImageSet
from megatron_cca.lab.evaluation.measuring import evaluate
from megatron_cca.lab.evaluation.report import as_json, former_files, table, write_report
from megatron_cca.programs import evaluate as program
from megatron_cca.programs.parsing import parsed
from tests.distributed.launch import ROOT, run_tool
from tests.references import tiny_clip, tiny_rewards

TOOL = ROOT / "tools" / "evaluate.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Held-out scans as tools/generate.py would leave them, every tenth with a wrong label."""
    folder, scans = tmp_path_factory.mktemp("drawn"), load_scans()[1]
    (folder / "images").mkdir()
    with (folder / "prompts.jsonl").open("w") as file:
        for index, (image, label) in enumerate(zip(scans.images[:300], scans.labels, strict=False)):
            name = f"images/{index:06}.png"
            Image.fromarray(image).save(folder / name)
            record = {"file": name, "prompt": captions_of(int(label))[0], "label": int(label + (index % 10 == 0)) % 10}
            file.write(json.dumps({**record, "seed": index}) + "\n")
    return folder


def run(*arguments):
    return run_tool(TOOL, *arguments, cwd=ROOT, timeout=200)


def test_a_report_is_written_and_printed(drawn, tmp_path):
    train = load_scans()[0]
    np.savez(tmp_path / "half.npz", np.repeat(train.images[::2, ..., None], 3, 3), train.labels[::2])
    sets = ["--samples", f"drawn $x$={drawn}", "--samples", tmp_path / "half.npz"]
    numbers = ["--kid-subset-size", "301", "--kid-subsets", "3", "--neighborhood", "5"]
    output = tmp_path / "new" / "out"
    done = run(*sets, "--reference", "digits", "--output", output, *numbers)
    assert done.returncode == 0, done.stderr
    # Megatron-Core warns if it is imported before the platform is installed.
    assert "Falling back" not in done.stderr
    names = {
        "metrics.json",
        "table.md",
        "fid_is.png",
        "class_accuracy.png",
        "samples-drawn $x$.png",
        "samples-half.png",
    }
    assert {path.name for path in output.iterdir()} == names
    report = json.loads((output / "metrics.json").read_text())
    ours, half = report["sets"]
    settings = FidelitySettings(("fid", "inception_score", "precision", "recall", "sfid"), neighborhood=5)
    scans = load_scans()[1].images[:300]
    expected = fidelity(scans, train.images, open_extractor("digits"), settings)
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert 0.85 < ours["class_accuracy"] <= 0.9
    assert set(ours["class_accuracy_per_class"]) == {str(label) for label in range(10)}
    assert ours["left_out"] == {
        "kid": "--samples drawn $x$: 300 images are too few for KID with kid_subset_size 301; it wants 301 or more"
    }
    assert "drawn $x$: KID is left out (--samples drawn $x$: 300 images" in done.stderr
    assert half["class_accuracy"] == 1
    assert {"kid", "kid_std"} <= half.keys()
    assert (ours["images"], half["images"], report["reference"]["images"]) == (300, 719, 1437)
    assert report["settings"]["neighborhood"] == 5
    assert report["extractor"]["name"] == report["settings"]["classifier"] == "digits"
    assert {"python", "torch", "torch-fidelity"} <= report["packages"].keys()
    lines = (output / "table.md").read_text().splitlines()
    assert lines[0] == "| samples | images | FID ↓ | sFID ↓ | IS ↑ | KID ↓ | precision ↑ | recall ↑ | accuracy ↑ |"
    assert lines[2].startswith(f"| drawn $x$ | 300 | {ours['fid']:.2f} |")
    assert lines[3].startswith(f"| half | 719 | **{half['fid']:.2f}** |")
    assert lines[2].split("|")[6].strip() == "–"
    assert "\n".join(lines) in done.stdout
    for path in output.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5


def test_a_mistake_is_one_line_and_leaves_nothing(drawn, tmp_path):
    output = tmp_path / "new" / "out"
    done = run("--samples", drawn, "--reference", drawn, "--output", output)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron_cca: error: --extractor: inception needs its weights; download https://")
    assert done.stderr.count("\n") == 1
    assert not output.parent.exists()


def settings_of(drawn, **options):
    settings = {"samples": (f"drawn={drawn}",), "reference": "digits", "extractor": "digits", "output": Path("out")}
    return EvaluateOptions(**settings | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"samples": ("a=nowhere",)},
            "--samples: nowhere: does not exist; give a folder of images, an .npz, digits or",
        ),
        ({"reference": str(TOOL)}, f"--reference: {TOOL}: is a file, but no .npz; give a folder"),
        ({"extractor": "vgg"}, "--extractor: 'vgg' is none of"),
        ({"classifier": "resnet"}, "--classifier: 'resnet' is neither"),
        ({"clip": ROOT}, f"--clip: {ROOT} has no config.json"),
        (
            {"metrics": ()},
            "--metrics: names none, and none of --classifier, --clip, --detector and --scorer is given: nothing to do",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(drawn, options, message):
    with pytest.raises(UserError) as error:
        check(settings_of(drawn, **options))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metrics": ("fid", "kid")},
            "--samples drawn: 300 images are too few for KID with kid_subset_size 1000; it wants 1000 or more",
        ),
        (
            {"extractor": "inception", "metrics": ("sfid",)},
            "--samples drawn: 300 images are too few for sFID on 2023 features; it wants 2024 or more",
        ),
        (
            {"samples": ("a=digits",), "clip": Path("x")},
            "--clip: no sample set has prompts; they come from prompts.jsonl",
        ),
    ],
)
def test_what_images_do_not_allow_is_refused_before_networks_are_opened(drawn, monkeypatch, options, message):
    def refuse(*arguments):
        raise AssertionError("opened a network")

    monkeypatch.setattr("megatron_cca.lab.evaluation.measuring.open_extractor", refuse)
    with pytest.raises(UserError) as error:
        evaluate(settings_of(drawn, **options), CPU)
    assert str(error.value).startswith(message)


def test_other_sizes_are_refused_for_the_digits_and_said_for_others(tmp_path, capsys):
    for name, size in (("small", 8), ("large", 16)):
        np.savez(tmp_path / f"{name}.npz", np.zeros((80, size, size, 3), np.uint8))
    settings = settings_of(None, samples=(f"a={tmp_path / 'large.npz'}",))
    with pytest.raises(UserError, match="--samples a: --extractor digits takes images of 8 x 8 pixels, found 16 x 16"):
        evaluate(settings, CPU)
    sets, reference = {"a": ImageSet(np.zeros((80, 16, 16, 3), np.uint8))}, ImageSet(np.zeros((80, 8, 8, 3), np.uint8))
    chosen = choose_metrics(replace(settings, extractor="own.py:f"), sets, reference, {"features": 3})["a"]
    assert chosen.metrics == ("fid", "precision", "recall")
    assert chosen.left_out["sfid"] == "--extractor own.py:f: gives no spatial features, on which sFID is computed"
    assert "a: its images are 16 x 16 pixels, the reference's 8 x 8" in capsys.readouterr().err


def test_clip_scores_and_accuracy_need_no_extractor(drawn, tmp_path):
    clip = tiny_clip.save(tmp_path)
    settings = settings_of(drawn, metrics=(), clip=clip, samples=(f"drawn={drawn}", "scans=digits-held-out"))
    evaluation = evaluate(settings, CPU)
    ours, scans = evaluation.sets
    expected = ClipScorer(clip).scores(ours.images.images, ours.images.prompts)
    assert np.allclose(ours.clip_scores, expected, atol=1e-4)
    assert scans.clip_scores is None
    assert table(evaluation).splitlines()[0] == "| samples | images | accuracy ↑ | CLIP score ↑ |"
    assert table(evaluation).splitlines()[3].endswith("| – |")
    output = tmp_path / "out"
    with reserved_folder(output, former_files(output), overwrite=False):
        assert "fid_is.png" not in write_report(output, evaluation)
    assert json.loads((output / "metrics.json").read_text())["sets"][0]["clip_score"] == pytest.approx(expected.mean())


def test_prompts_that_clip_cuts_and_files_that_are_not_read_are_in_the_report(drawn, tmp_path, capsys):
    folder = shutil.copytree(drawn, tmp_path / "drawn")
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    lines[3]["prompt"] = "seven " * 40
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    clip = tiny_clip.save(tmp_path)
    limit, count = 20, len(lines) - 1
    ids = ClipScorer(clip).processor.tokenizer
    cut = sum(len(ids(line["prompt"])["input_ids"]) > limit for line in lines[1:])
    assert 0 < cut < count or cut == count
    evaluation = evaluate(settings_of(folder, metrics=(), clip=clip, samples=(f"drawn={folder}",)), CPU)
    line = f"{cut} of {count} prompts are longer than the 20 tokens that this CLIP reads; their ends are not scored"
    said = capsys.readouterr().err
    assert f"drawn: {line}" in said
    assert f"--samples {folder}: 1 images are not in prompts.jsonl and are not read" in said
    assert table(evaluation).endswith(f"CLIP score of drawn: {line}.")
    report = as_json(evaluation)["sets"][0]
    assert (report["clip_prompts_cut"], report["clip_tokens"], len(report["notices"])) == (cut, 20, 1)


def test_a_former_report_is_replaced_only_when_asked_and_nothing_else_ever(drawn, tmp_path):
    evaluation = evaluate(settings_of(drawn, metrics=("fid",)), CPU)
    with reserved_folder(tmp_path, former_files(tmp_path), overwrite=False):
        write_report(tmp_path, evaluation)
    (tmp_path / "samples-former.png").touch()
    with (
        pytest.raises(UserError, match=r"already holds class_accuracy.png and \d more; give an empty folder or --over"),
        reserved_folder(tmp_path, former_files(tmp_path), overwrite=False),
    ):
        pass
    with reserved_folder(tmp_path, former_files(tmp_path), overwrite=True):
        write_report(tmp_path, evaluation)
    assert not (tmp_path / "samples-former.png").exists()
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(UserError, match=r"holds thesis.tex: not what --overwrite is meant to replace"),
        reserved_folder(tmp_path, former_files(tmp_path), overwrite=True),
    ):
        pass


def test_nothing_half_written_stays(drawn, tmp_path, monkeypatch):
    evaluation = evaluate(settings_of(drawn, metrics=("fid",)), CPU)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_cca.lab.evaluation.report.class_accuracy_bars", full)
    with (
        pytest.raises(UserError, match="is full"),
        reserved_folder(tmp_path / "out", former_files(tmp_path / "out"), overwrite=False),
    ):
        write_report(tmp_path / "out", evaluation)
    assert not (tmp_path / "out").exists()


def test_a_report_keeps_out_of_the_folders_that_it_reads(drawn):
    done = run("--samples", drawn, "--reference", "digits", "--output", drawn / "images" / "out")
    assert done.returncode == 2
    assert "are in each other's way; give another folder" in done.stderr


def parsed_settings(*arguments):
    return parsed(program.OPTIONS, [*map(str, arguments), "--output", "out"])


def test_sets_are_named_and_defaults_follow_the_reference(monkeypatch, tmp_path):
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    paths = ["a=b", "x=runs/cca", "runs/s=1/images", "samples.npz", "base+cfg0.5=samples.npz"]
    samples = [part for path in paths for part in ("--samples", path)]
    found = parsed_settings(*samples, "--reference", "digits-held-out")
    assert found.sets == {
        "a=b": "a=b",
        "x": "runs/cca",
        "images": "runs/s=1/images",
        "samples": "samples.npz",
        "base+cfg0.5": "samples.npz",
    }
    assert (found.network, found.metrics) == ("digits", None)
    found = parsed_settings(*samples, "--reference", "real", "--metrics", "fid", "fid", "kid")
    assert (found.network, found.metrics) == ("inception", ("fid", "kid"))
    assert parsed_settings(*samples, "--reference", "real", "--metrics").metrics == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "a/x", "--samples", "b/x"], "--samples: two sets are called x; tell them apart with NAME=PATH"),
        (["--samples", "=a"], "--samples: '=a' is not of the form [NAME=]PATH"),
        (
            ["--samples", "a", "--metrics", "lpips"],
            f"--metrics: 'lpips' is unknown; known: {', '.join((*METRICS, *ON_REQUEST))}",
        ),
        (["--samples", "a", "--kid-subset-size", "1"], "--kid-subset-size: must be 2 or more, found 1"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UserError) as error:
        parsed_settings(*arguments, "--reference", "digits")
    assert str(error.value) == message


def test_rewards_stand_beside_fid(drawn, tmp_path, capsys):
    folder = tmp_path / "clip"
    folder.mkdir()
    clip, own = tiny_clip.save(folder), tmp_path / "own.py"
    own.write_text("def ink(images, prompts):\n    return images.reshape(len(images), -1).mean(1)\n")
    scorers = (f"pickscore:{clip}", f"{own}:ink")
    options = {"scorer": scorers, "samples": (f"drawn={drawn}", "scans=digits-held-out")}
    evaluation = evaluate(settings_of(drawn, metrics=("fid",), **options), CPU)
    ours, scans = evaluation.sets
    ink = ours.images.images.reshape(300, -1).mean(1)
    np.testing.assert_allclose(ours.rewards[scorers[1]].scores, ink)
    expected = (
        ClipScorer(clip).model.logit_scale.exp()
        / 100
        * ClipScorer(clip).scores(ours.images.images, ours.images.prompts)
    )
    np.testing.assert_allclose(ours.rewards[scorers[0]].scores.clip(0), expected, atol=1e-4)
    assert not scans.rewards
    lines = table(evaluation).splitlines()
    assert lines[0] == "| samples | images | FID ↓ | accuracy ↑ | PickScore ↑ | own.py:ink ↑ |"
    assert lines[2].endswith(f" {ink.mean():.2f} |")
    assert lines[3].endswith("| – | – |")
    assert "misleads" not in lines[-1]
    report = as_json(evaluation)["sets"][0]["rewards"]
    assert report[scorers[1]]["mean"] == pytest.approx(ink.mean())
    assert {"prompts_cut", "tokens"} <= report[scorers[0]].keys()
    alone = table(evaluate(settings_of(drawn, metrics=(), **options), CPU)).splitlines()
    assert alone[0] == lines[0]
    assert alone[-1].startswith("A reward alone misleads")
    with pytest.raises(UserError, match=r"^--scorer: no sample set has prompts"):
        evaluate(settings_of(drawn, **options | {"samples": ("a=digits",)}), CPU)


def test_rewards_of_files_have_headings_of_their_own(drawn, tmp_path, capsys):
    tiny_rewards.image_reward(tmp_path)
    scorer = f"imagereward:{tmp_path / 'ImageReward.pt'}"
    options = {"scorer": (scorer,), "samples": (f"drawn={drawn}",), "metrics": ()}
    evaluation = evaluate(settings_of(drawn, **options), CPU)
    assert table(evaluation).startswith("| samples | images | FID ↓ | accuracy ↑ | ImageReward ↑ |")
    report = as_json(evaluation)["sets"][0]["rewards"][scorer]
    assert report["std"] > 0
    assert report["tokens"] == 35
    assert "drawn: its images of 8 x 8 pixels are enlarged (imagereward to 32)" in capsys.readouterr().err


def test_statistics_of_a_reference_stand_for_its_images(drawn, tmp_path):
    file = tmp_path / "kept" / "scans.npz"
    options = {"metrics": ("fid", "sfid"), "samples": (f"drawn={drawn}",)}
    whole = evaluate(settings_of(drawn, **options, save_statistics=file), CPU)
    kept = evaluate(settings_of(drawn, **options | {"reference": str(file)}), CPU)
    assert kept.sets[0].metrics == whole.sets[0].metrics
    scans = load_scans()[0].images
    assert f" {len(scans)} images" in table(kept)
    with np.load(file) as opened:
        arrays = dict(opened)
    pixels = np.repeat(scans[:, None], 3, axis=1)
    features = open_extractor("digits")(torch.from_numpy(pixels))[0].double().numpy()
    np.testing.assert_allclose(arrays["mu"], features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["sigma"], np.cov(features.T), rtol=1e-5, atol=1e-6)
    asked = settings_of(drawn, **options | {"reference": str(file)})
    for change, message in (
        ({"fingerprint": "0" * 64}, "holds statistics of digits with other weights"),
        (
            {"extractor": "dinov2", "fingerprint": "0" * 64},
            "holds statistics of dinov2, found --extractor digits; name",
        ),
        ({"size": [16, 16]}, "holds statistics of images of 16 x 16 pixels, the samples have 8 x 8"),
        ({"size": 3}, "are damaged"),
    ):
        np.savez(file, **arrays | change)
        with pytest.raises(UserError, match=message):
            evaluate(asked, CPU)
    np.savez(file, mu=arrays["mu"], sigma=arrays["sigma"])
    with pytest.raises(UserError, match="does not say of which extractor its mu and sigma are"):
        evaluate(asked, CPU)
    with pytest.raises(UserError, match="nothing to keep"):
        evaluate(settings_of(drawn, metrics=("precision",), save_statistics=file), CPU)


def test_hpsv2_is_shown_to_the_decimals_in_which_models_differ():
    from megatron_cca.lab.evaluation.report import _cell

    rows = [{"hpsv2:a.pt": 0.28374}, {"hpsv2:a.pt": 0.28351}]
    assert [_cell("hpsv2:a.pt", row, rows, True) for row in rows] == ["**0.2837**", "0.2835"]
