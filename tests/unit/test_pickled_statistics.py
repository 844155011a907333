"""EDM's and EDM2's pickles of mean and covariance: read as numbers, never run."""

import pickle
import struct

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from megatron_cca.errors import UserError
from megatron_cca.io.pickled_arrays import pickled_arrays
from megatron_cca.lab.evaluation import EvaluateOptions
from megatron_cca.lab.evaluation.checks import usable_moments
from megatron_cca.lab.evaluation.image_sets import read_images
from megatron_cca.lab.evaluation.measuring import evaluate
from megatron_cca.lab.evaluation.report import table
from tests.references.bomb import Bomb

CPU = torch.device("cpu")
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
RANDOM = np.random.default_rng(0)


def written(path, content, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def moments(width):
    rows = RANDOM.normal(size=(3 * width, width))
    return {"mu": rows.mean(0), "sigma": np.cov(rows.T)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_are_read_as_pickle_reads_them(protocol, tmp_path):
    content = {
        "double": RANDOM.normal(size=(3, 4)),
        "single": RANDOM.normal(size=5).astype(np.float32),
        "by columns": np.asfortranarray(RANDOM.normal(size=(2, 3))),
        "other end first": RANDOM.normal(size=4).astype(">f8"),
        "read only": np.frombuffer(bytes(range(8)), np.uint8),
        "empty": np.zeros((0, 2)),
        "inner": {"count": 7, "text": "ü", "none": None, "scalar": np.float64(1.5)},
    }
    found = pickled_arrays(written(tmp_path / "a.pkl", content, protocol))
    assert found.keys() == content.keys()
    for name in list(content)[:-1]:
        np.testing.assert_array_equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype.newbyteorder("=")
    assert found["inner"] == content["inner"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("wrapped", [lambda bomb: bomb, lambda bomb: {"fid": {"mu": bomb}}, lambda bomb: [{1: bomb}]])
def test_a_malicious_pickle_does_nothing(protocol, wrapped, tmp_path):
    file = written(tmp_path / "a.pkl", wrapped(Bomb(tmp_path / "it ran")), protocol)
    with pytest.raises(UserError, match=r"^.*a.pkl: is no pickle of numbers and arrays alone \(it asks for "):
        read_images(file)
    assert not (tmp_path / "it ran").exists()


def test_what_is_no_table_of_numbers_is_refused(tmp_path):
    for content, message in (
        ([1, 2], "it holds no table with names"),
        ({"fid": {"mu": {1, 2}}}, "it holds a set"),
        ({"fid": np.array([{}])}, "something else than numbers"),
        ({"fid": np.array(["text"])}, "something else than numbers"),
        ({"a": {"b": {"c": {"d": 1}}}}, "it holds no table with names"),
        ({"images": np.zeros(3)}, "has no mu and sigma, and none of fid, fd_dinov2 that hold them; found images"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.eye(2)}}, r"must be \[D\] and \[D, D\], found \[3\] and \[2, 2\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "mu and sigma are not all finite numbers; write them anew"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu and sigma must be numbers, found int64"),
    ):
        with pytest.raises(UserError, match=message):
            read_images(written(tmp_path / "a.pkl", content))


def test_a_forged_array_is_refused(tmp_path):
    whole = pickle.dumps({"mu": np.arange(4.0)})
    for forged in (
        whole.replace(b"\x8c\x02f8", b"\x8c\x02O8"),
        whole.replace(b"K\x04\x85", b"K\x05\x85"),
        whole[: len(whole) // 2],
        b"",
        b"hello",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    ):
        assert forged != whole
        (tmp_path / "a.pkl").write_bytes(forged)
        with pytest.raises(UserError, match="is no pickle of numbers and arrays alone"):
            pickled_arrays(tmp_path / "a.pkl")


def test_each_extractor_gets_its_own_table(tmp_path):
    edm2 = {"fid": moments(4), "fd_dinov2": moments(5)}
    found = read_images(written(tmp_path / "edm2.pkl", edm2))
    for network, name in (("inception", "fid"), ("dinov2:folder", "fd_dinov2")):
        mean, covariance = usable_moments(network, found)["features"]
        np.testing.assert_array_equal(mean, edm2[name]["mu"])
        np.testing.assert_array_equal(covariance, edm2[name]["sigma"])
    edm = read_images(written(tmp_path / "edm.pkl", edm2["fid"]))
    assert edm.moments_of.keys() == {"inception"}
    np.testing.assert_array_equal(edm.moments_of["inception"]["features"][0], edm2["fid"]["mu"])


def test_fid_to_a_pickle_is_that_to_the_images_it_is_of(tmp_path):
    (tmp_path / "dinov2").mkdir()
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Dinov2Model(Dinov2Config(**sizes, image_size=112, patch_size=56)).save_pretrained(tmp_path / "dinov2")
    for name in ("real", "drawn"):
        images = RANDOM.integers(256, size=(20, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)
    options = {"samples": (str(tmp_path / "drawn.npz"),), "output": tmp_path / "out", "metrics": ("fid",)}
    options |= {"extractor": f"dinov2:{tmp_path / 'dinov2'}", "device": "cpu"}
    kept, real = tmp_path / "kept.npz", str(tmp_path / "real.npz")
    whole = evaluate(EvaluateOptions(**options, reference=real, save_statistics=kept), CPU)
    with np.load(kept) as arrays:
        table_of = {name: arrays[name] for name in ("mu", "sigma")}
    file = str(written(tmp_path / "edm2.pkl", {"fid": moments(3), "fd_dinov2": table_of}))
    found = evaluate(EvaluateOptions(**options, reference=file), CPU)
    assert found.sets[0].metrics == whole.sets[0].metrics
    assert found.sets[0].metrics["fid"] > 0
    assert "edm2.pkl, mean and covariance alone; extractor: dinov2:" in table(found)
    written(tmp_path / "edm2.pkl", {"fd_dinov2": moments(5)})
    with pytest.raises(UserError, match="its mean of features has 5 numbers, the extractor's features have 4"):
        evaluate(EvaluateOptions(**options, reference=file), CPU)
    with pytest.raises(UserError, match=r"edm2.pkl holds statistics of dinov2, found --extractor digits"):
        evaluate(EvaluateOptions(**options | {"extractor": "digits"}, reference=file), CPU)
