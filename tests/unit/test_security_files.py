"""SECURITY.md's promises about files: none runs code, none leads out of its folder, and no secret is written down.

Every kind of file gets a pickle that would leave a witness if it ran.
"""

import contextlib
import io
import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_cca.checkpoint.distributed import plain_data_only
from megatron_cca.checkpoint.huggingface import import_checkpoint
from megatron_cca.checkpoint.integrity import INDEX
from megatron_cca.checkpoint.stored_tensors import StoredTensors
from megatron_cca.checkpoint.summary import summarize
from megatron_cca.config.load import load_config
from megatron_cca.data.manifest import open_table
from megatron_cca.data.reference_cache import ReferenceCache, ReferenceCacheWriter
from megatron_cca.data.sources import open_source
from megatron_cca.data.tokenizers import open_image_tokenizer
from megatron_cca.errors import UserError
from megatron_cca.io.pickles import load_tensors, unpickled
from megatron_cca.lab.evaluation.archives import read_archive
from megatron_cca.lab.evaluation.extractors import open_extractor
from megatron_cca.lab.evaluation.image_sets import list_folder
from tests.references.bomb import Bomb


@pytest.fixture
def witness(tmp_path):
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists(), "a pickle was run"


def refused(call):
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it ran")))  # noqa: S301 - to see that it is one
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_calls_only_what_is_allowed(witness, protocol):
    with pytest.raises(ValueError, match="it asks for"):
        unpickled(pickle.dumps([Bomb(witness)], protocol), lambda module, name: module == "collections")


def test_a_pickle_cannot_change_what_a_name_stands_for():
    """BUILD with a second state sets attributes: of a class, if one lies on the stack."""
    content = b"cpathlib\nPosixPath\n(N}Vis_file\nI01\nstb."
    with pytest.raises(ValueError, match="it changes what a name stands for"):
        unpickled(content, lambda module, name: (module, name) == ("pathlib", "PosixPath"))
    assert callable(Path.is_file)


def test_what_megatron_allows_is_not_allowed_in_tensors(witness):
    """It adds numpy's functions, which trust a forged data type, to torch's list for the whole process."""
    file = io.BytesIO()
    torch.save({"a": np.arange(3)}, file)
    for content in (file.getvalue(), saved_by_torch(Bomb(witness))):
        with pytest.raises(ValueError, match="it asks for"):
            load_tensors(content)


def test_a_name_of_any_length_is_refused_at_once():
    """torch's advice on what to do about a name takes it apart in quadratic time."""
    for length in (1000, 10**6):
        with pytest.raises(ValueError, match=r"it asks for os\.aaa"):
            load_tensors(b"\x80\x02cos\n" + b"a" * length + b"\n.")


def saved_by_torch(found):
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


def bombs(folder, witness):
    """For each kind of file one with a bomb in it, and what reads it."""
    objects = np.array([Bomb(witness)], dtype=object)
    torch.save({"images": Bomb(witness)}, folder / "1.pth")
    (folder / "list.json").write_text(json.dumps({"prefix": str(folder), "path_list": ["1.pth"]}))
    (folder / "config.yaml").write_text(f"data: !!python/object/apply:os.system ['touch \"{witness}\"']")
    torch.save(Bomb(witness), folder / "inception.pth")
    torch.save({"model": {}, "args": Bomb(witness)}, folder / "vq_ds16_c2i.pt")
    np.save(folder / "samples.npy", objects)
    np.save(folder / "codebook.npy", objects)
    for name in ("a_codes", "a_labels"):
        (folder / name).mkdir()
        np.save(folder / name / "0.npy", objects)
    np.savez(folder / "images.npz", arr_0=objects)
    return {
        "a configuration": lambda: load_config(folder / "config.yaml"),
        "an override": lambda: load_config(
            None, [f"data.path={{!!python/object/apply:os.system ['touch {witness}']: 1}}"]
        ),
        "token shards": lambda: open_table(folder, 1, 128),
        "a codebook": lambda: open_image_tokenizer(folder),
        "an image tokenizer": lambda: open_image_tokenizer(folder / "vq_ds16_c2i.pt"),
        "images": lambda: read_archive(folder / "images.npz"),
        "inception's weights": lambda: open_extractor("inception", folder / "inception.pth"),
        "emu3's files": lambda: read_record(folder / "list.json", "emu3"),
        "llamagen's codes": lambda: read_record(folder, "llamagen"),
    }


def read_record(path, layout):
    source = open_source(path, layout)
    try:
        return source[0]
    except Exception as error:
        raise UserError(error) from None


def test_no_file_runs_code(tmp_path, witness):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, call in bombs(folder, witness).items():
        assert refused(call), name
        assert not witness.exists(), name


def test_a_reference_cache_runs_no_code(tmp_path, witness):
    folder = tmp_path / "cache"
    folder.mkdir()
    ReferenceCacheWriter(folder, {}, {})
    np.savez(folder / "training_000000000_000000000.npz", logps=np.array([Bomb(witness)], dtype=object))
    assert "damaged" in refused(lambda: ReferenceCache(folder).read("training", 0))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_weights_in_pickles_are_not_read(name, hf, tmp_path, witness):
    (hf / "model.safetensors").unlink()
    torch.save(Bomb(witness), hf / name)
    said = refused(lambda: import_checkpoint(hf, tmp_path / "out", progress_bar=False))
    assert name in said
    assert not (tmp_path / "out").exists()


def test_a_clip_in_a_pickle_or_with_code_of_its_own_is_not_run(tmp_path, witness):
    pytest.importorskip("transformers")
    from megatron_cca.lab.evaluation.clip import ClipScorer
    from tests.references import tiny_clip

    (tmp_path / "clip").mkdir()
    folder = tiny_clip.save(tmp_path / "clip")
    ClipScorer(folder)
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(witness)!r}).touch()\nclass Evil: pass\n")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / file).is_file():
            found = json.loads((folder / file).read_text())
            code = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
            (folder / file).write_text(json.dumps(found | {"auto_map": code}))
    with contextlib.suppress(UserError):
        ClipScorer(folder)
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(witness), folder / "pytorch_model.bin")
    refused(lambda: ClipScorer(folder))


@pytest.fixture
def one_process():
    """The process group that Megatron wants, of this process alone."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if ours:
        dist.destroy_process_group()


def state(common, extra):
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.ones(4)),
        "layer._extra_state": ShardedObject("layer._extra_state", extra, (1,), (0,)),
        "common": common,
    }


def written(folder, common, extra, **more):
    """A checkpoint by Megatron itself."""
    from megatron.core import dist_checkpointing

    folder.mkdir()
    dist_checkpointing.save({**state(common, extra), **more}, str(folder))
    return folder


def loaded(folder):
    from megatron.core import dist_checkpointing

    template = state(None, None)
    del template["common"]
    with plain_data_only(StoredTensors(folder, "--checkpoint")):
        return dist_checkpointing.load(template, str(folder))


def bytes_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_a_plain_checkpoint_is_loaded(one_process, tmp_path):
    scales = bytes_tensor(pickle.dumps({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"a": 1}}))
    found = loaded(written(tmp_path / "a", {"step": 3, "groups": [{"lr": 0.1}]}, scales))
    assert found["common"] == {"step": 3, "groups": [{"lr": 0.1}]}
    assert torch.equal(found["weight"], torch.ones(4))
    assert torch.equal(found["layer._extra_state"], scales)


def test_a_checkpoint_runs_no_code_through_megatron(one_process, tmp_path, witness):
    kinds = {
        "common_state": ({"a": Bomb(witness)}, None),
        "layer._extra_state": ({}, Bomb(witness)),
        "layer._extra_state/": ({}, bytes_tensor(pickle.dumps(Bomb(witness)))),
    }
    for number, (name, (common, extra)) in enumerate(kinds.items()):
        folder = written(tmp_path / str(number), common, extra)
        said = refused(lambda folder=folder: loaded(folder))
        assert name in said and "is damaged or holds more than plain data" in said


def test_arguments_of_megatron_lm_are_plain_data_and_left_out(one_process, tmp_path, witness):
    """Megatron-Core takes its way of loading from them."""
    arguments = Namespace(num_layers=2, async_save=True, async_strategy="nowhere")
    common = {"args": arguments, "iteration": 3, "checkpoint_version": 3.0}
    found = loaded(written(tmp_path / "a", {}, None, **common))
    assert (found["iteration"], "args" in found) == (3, False)
    for number, hostile in enumerate((Namespace(num_layers=Bomb(witness)), Bomb(witness))):
        folder = written(tmp_path / str(number), {}, None, args=hostile)
        assert "common_state" in refused(lambda folder=folder: loaded(folder))
    folder = written(tmp_path / "elsewhere", {}, arguments)
    assert "it asks for argparse.Namespace" in refused(lambda: loaded(folder))


def test_megatron_alone_would_run_it(one_process, tmp_path):
    """Why there is a :func:`plain_data_only` at all; when this fails, an upgrade has made it superfluous."""
    from megatron.core import dist_checkpointing

    folder = written(tmp_path / "a", {"a": Bomb(tmp_path / "it ran")}, None)
    dist_checkpointing.load({}, str(folder))
    assert (tmp_path / "it ran").exists()


def test_an_index_and_a_common_file_run_no_code(one_process, tmp_path, witness):
    folder = written(tmp_path / "a", {}, None)
    torch.save(Bomb(witness), folder / "common.pt")
    assert "common.pt is a pickle of an older Megatron" in refused(lambda: loaded(folder))
    (folder / "common.pt").unlink()
    (folder / INDEX).write_bytes(pickle.dumps(Bomb(witness)))
    assert "it asks for pathlib" in refused(lambda: loaded(folder))


def test_a_listing_stays_in_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        (folder / "prompts.jsonl").write_text(json.dumps({"file": name}))
        assert "is not a file of" in refused(lambda: list_folder(folder))
    snapshot, blobs = tmp_path / "hub/snapshots/1", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_bytes(b"public")
    (snapshot / "0.png").symlink_to("../../blobs/0")
    (snapshot / "1.png").symlink_to(tmp_path / "secret.png")
    (snapshot / "prompts.jsonl").write_text(json.dumps({"file": "0.png"}))
    assert list_folder(snapshot).files == [snapshot / "0.png"]
    (snapshot / "prompts.jsonl").write_text(json.dumps({"file": "1.png"}))
    assert "is not a file of" in refused(lambda: list_folder(snapshot))


def test_files_that_travel_with_a_model_are_its_own(hf, tmp_path):
    """What a link leads to would be published with the export. The hub's cache consists of links, into its blobs."""
    (tmp_path / "id_rsa").write_text("secret")
    (hf / "notes.txt").symlink_to(tmp_path / "id_rsa")
    assert "notes.txt is a symbolic link that leaves" in refused(
        lambda: import_checkpoint(hf, tmp_path / "out", progress_bar=False)
    )
    (hf / "notes.txt").unlink()
    snapshot, blobs = tmp_path / "hub/snapshots/1", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in hf.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    import_checkpoint(snapshot, tmp_path / "out", progress_bar=False)


SECRETS = {"WANDB_API_KEY": "w4ndb-s3cret", "HF_TOKEN": "hf_s3cret", "AWS_SECRET_ACCESS_KEY": "aws-s3cret"}


def test_secrets_are_neither_read_nor_written(monkeypatch, tmp_path):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = load_config(None, ["training.output_dir=/x"])
    written_down = json.dumps(summarize(config)) + yaml.safe_dump(json.loads(json.dumps(summarize(config)["config"])))
    assert not any(value in written_down for value in SECRETS.values())
    for key in ("logging.wandb_api_key", "logging.api_key", "training.hf_token"):
        assert "unknown key" in refused(lambda key=key: load_config(None, [f"{key}=s3cret"]))
    path = tmp_path / "config.yaml"
    path.write_text("training: {output_dir: $WANDB_API_KEY, seed: 1}\n")
    said = refused(lambda: load_config(path))
    assert "$WANDB_API_KEY is not replaced here" in said and SECRETS["WANDB_API_KEY"] not in said
