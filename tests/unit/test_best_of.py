"""Best of N: scorers of the user's own and CLIP, candidates and choices; what is refused."""

import numpy as np
import pytest

from megatron_cca.errors import UserError
from megatron_cca.generation.decode_loop import ImageRequest, best_candidates, candidate_requests, cut_prompts
from megatron_cca.lab.evaluation.clip import check_scorer, open_scorer
from tests.references import tiny_clip

IMAGES = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)


def plugin(folder, body):
    file = folder / "scorer.py"
    file.write_text(f"import numpy as np\ndef score(images, prompts):\n    return {body}\n")
    return f"{file}:score"


def test_the_first_candidate_has_the_seed_itself():
    requests = [ImageRequest(np.array([1]), 5), ImageRequest(np.array([2]), 9)]
    found = candidate_requests(requests, 3)
    assert [request.seed for request in found] == [5, [5, 1], [5, 2], 9, [9, 1], [9, 2]]
    assert [int(request.prompt[0]) for request in found] == [1, 1, 1, 2, 2, 2]
    # NumPy takes a number and a list of it alone for the same seed; the others must be different streams.
    streams = {np.random.default_rng(request.seed).random() for request in found}
    assert len(streams) == 6


def test_the_best_of_each_prompt_is_chosen(tmp_path):
    scorer = open_scorer(plugin(tmp_path, "images[:, 0, 0, 0].astype(float) + [len(p) for p in prompts]"), "cpu")
    choice = best_candidates(scorer, IMAGES, ["a", "bcd"], 3)
    first = IMAGES[:, 0, 0, 0].astype(float)
    expected = [first[:3].argmax(), 3 + first[3:].argmax()]
    assert choice.indices.tolist() == expected
    assert choice.scores.tolist() == [first[expected[0]] + 1, first[expected[1]] + 3]


def test_clip_scores_are_those_of_evaluation(tmp_path):
    from megatron_cca.lab.evaluation.clip import ClipScorer

    folder = tiny_clip.save(tmp_path)
    prompts = ["a handwritten seven"] * 6
    found = open_scorer(f"clip:{folder}", "cpu")(IMAGES, prompts)
    np.testing.assert_array_equal(found, ClipScorer(folder).scores(IMAGES, prompts))


def test_prompts_that_clip_reads_in_part_are_counted(tmp_path):
    scorer = open_scorer(f"clip:{tiny_clip.save(tmp_path)}", "cpu")
    # 18 letters, begin and end are the 20 tokens that this CLIP reads.
    prompts = ["a" * 18, "a" * 19, "b" * 90, ""]
    cut = cut_prompts(scorer, prompts)
    assert (cut.prompts, cut.count, cut.tokens) == (2, 4, 20)
    assert cut.line().startswith("2 of 4 prompts are longer than the 20 tokens")
    assert cut_prompts(scorer, prompts[:1]).line() is None
    long, short = scorer(IMAGES[:2], ["a" * 19, "a" * 18])
    assert long == scorer(IMAGES[:1], ["a" * 60])[0]
    assert cut_prompts(open_scorer(plugin(tmp_path, "[0.0] * len(prompts)"), "cpu"), prompts) is None
    assert np.isfinite(short)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("images.mean()", "must return 6 finite numbers for as many images, found []"),
        ("np.full(6, np.nan)", "must return 6 finite numbers for as many images, found nan among them"),
        ("['a'] * 6", "must return numbers, found a list"),
        ("__import__('torch').ones(6, requires_grad=True)", "must return numbers, found a Tensor"),
        ("1 / 0", "failed at line 3: ZeroDivisionError: division by zero"),
    ],
)
def test_a_scorer_that_returns_nonsense_is_refused(body, message, tmp_path):
    spec = plugin(tmp_path, body)
    with pytest.raises(UserError) as error:
        best_candidates(open_scorer(spec, "cpu"), IMAGES, ["a", "b"], 3)
    assert str(error.value) == f"--scorer: {spec} {message}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "ink",
            "--scorer: 'ink' is none of clip:FOLDER, pickscore:FOLDER, hpsv2:FILE, imagereward:FILE and "
            "FILE.py:FUNCTION",
        ),
        ("clip:nowhere", "--scorer: nowhere has no config.json"),
        ("nowhere.py:ink", "--scorer: the file nowhere.py does not exist"),
    ],
)
def test_what_is_no_scorer_is_refused(spec, message):
    with pytest.raises(UserError) as error:
        check_scorer(spec)
    assert str(error.value).startswith(message)
