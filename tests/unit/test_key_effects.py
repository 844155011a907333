"""What a key affects, as resumes, studies, the step-0 gate and reference caches treat it. Oracle: the table below."""

import dataclasses
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest

from megatron_cca.checkpoint import layout
from megatron_cca.config import Config, DataConfig, TrainingConfig, load
from megatron_cca.config.load import config_to_dict, load_config
from megatron_cca.config.schema import strict
from megatron_cca.errors import UserError
from megatron_cca.keys import Affects, effects, key, section
from megatron_cca.lab.studies.schedule import training_contents
from megatron_cca.lab.studies.tasks import digest
from megatron_cca.models import explicit
from megatron_cca.objectives import OBJECTIVES
from megatron_cca.training import caching
from megatron_cca.training.log_ratio_gate import numeric_path
from megatron_cca.training.resuming import check_resume

# The key; what becomes of a new value on a resume; whether a study takes the run for another one; and whether the
# reference's log-probabilities depend on it (cache), or their last bits only (path). A new key need not be here.
EXPECTED = """
model.name | refused | study | cache
model.num_layers | refused | study | cache
model.hidden_size | refused | study | cache
model.ffn_hidden_size | refused | study | cache
model.num_attention_heads | refused | study | cache
model.num_query_groups | refused | study | cache
model.kv_channels | refused | study | cache
model.qk_layernorm | refused | study | cache
model.add_qkv_bias | refused | study | cache
model.max_position_embeddings | refused | study | cache
model.layernorm_epsilon | refused | study | cache
model.rotary_base | refused | study | cache
model.vocab_size | refused | study | cache
model.codebook_size | refused | study | cache
model.num_classes | refused | study | cache
model.make_vocab_size_divisible_by | refused | study | -
model.padded_vocab_size | refused | study | -
model.hidden_dropout | refused | study | -
model.attention_dropout | refused | study | -
model.init_method_std | refused | study | cache
model.transformer_impl | refused | study | path
parallel.tensor_model_parallel_size | same numbers | - | path
parallel.pipeline_model_parallel_size | same numbers | - | -
parallel.virtual_pipeline_model_parallel_size | same numbers | - | -
parallel.context_parallel_size | same numbers | - | path
parallel.sequence_parallel | same numbers | - | path
parallel.tp_comm_overlap | same numbers | - | path
parallel.overlap_p2p_comm | same numbers | - | -
parallel.microbatch_group_size_per_vp_stage | same numbers | - | -
parallel.deallocate_pipeline_outputs | same numbers | - | -
lora.dim | refused | study | -
lora.alpha | refused | study | -
lora.target_modules | refused | study | -
objective.name | refused | study | -
objective.beta | refused | study | -
objective.negative_weight | refused | study | -
objective.normalization | refused | study | cache
reference.strategy | same numbers | study | -
reference.checkpoint | refused | study | cache
reference.cache | same numbers | study | -
reference.precision | refused | study | cache
reference.fp8_recipe | refused | study | cache
reference.fp8_param | refused | study | cache
reference.allow_bias | same numbers | study | -
data.path | refused | study | cache
data.condition_dropout | refused | study | cache
data.length_bucketing | refused | study | cache
data.pad_to_multiple_of | same numbers | study | path
data.prefetch | same numbers | - | -
data.loader | same numbers | - | -
validation.interval | takes effect | study | -
validation.fraction | refused | study | cache
validation.path | takes effect | study | cache
validation.iters | takes effect | study | -
validation.seed | refused | study | cache
optimizer.lr | takes effect | study | -
optimizer.min_lr | takes effect | study | -
optimizer.lr_decay_style | takes effect | study | -
optimizer.lr_warmup_iters | takes effect | study | -
optimizer.weight_decay | takes effect | study | -
optimizer.adam_beta1 | takes effect | study | -
optimizer.adam_beta2 | takes effect | study | -
optimizer.adam_eps | takes effect | study | -
optimizer.clip_grad | takes effect | study | -
optimizer.use_distributed_optimizer | refused | study | -
optimizer.num_distributed_optimizer_instances | same numbers | study | -
optimizer.overlap_grad_reduce | same numbers | study | -
optimizer.overlap_param_gather | same numbers | study | -
optimizer.ddp_bucket_size | same numbers | study | -
optimizer.average_in_collective | same numbers | study | -
optimizer.pad_buckets_for_high_nccl_busbw | same numbers | study | -
optimizer.grad_reduce_in_fp32 | takes effect | study | -
optimizer.optimizer_cpu_offload | same numbers | study | -
optimizer.optimizer_offload_fraction | same numbers | study | -
optimizer.overlap_cpu_optimizer_d2h_h2d | same numbers | study | -
optimizer.use_precision_aware_optimizer | takes effect | study | -
optimizer.main_grads_dtype | takes effect | study | -
optimizer.main_params_dtype | takes effect | study | -
optimizer.exp_avg_dtype | takes effect | study | -
optimizer.exp_avg_sq_dtype | takes effect | study | -
training.train_iters | takes effect | study | -
training.micro_batch_size | same numbers | - | path
training.global_batch_size | refused | study | cache
training.seed | refused | study | cache
training.precision | refused | study | cache
training.fp8_format | refused | study | -
training.fp8_recipe | refused | study | cache
training.fp8_amax_history_len | refused | study | -
training.fp8_amax_compute_algo | refused | study | -
training.logps_chunk_size | same numbers | study | path
training.recompute_granularity | same numbers | study | -
training.recompute_modules | same numbers | study | -
training.recompute_method | same numbers | study | -
training.recompute_num_layers | same numbers | study | -
training.output_dir | same numbers | - | -
training.pretrained_checkpoint | refused | - | cache
training.save_interval | takes effect | - | -
training.async_save | takes effect | study | -
training.keep_last | takes effect | study | -
training.keep_every | takes effect | study | -
training.distributed_timeout_minutes | takes effect | - | -
kernels.gradient_accumulation_fusion | same numbers | study | -
kernels.bias_activation_fusion | same numbers | study | path
kernels.bias_dropout_fusion | same numbers | study | path
kernels.apply_rope_fusion | same numbers | study | path
kernels.cuda_graph_impl | same numbers | study | -
kernels.cuda_graph_modules | same numbers | study | -
kernels.cuda_graph_warmup_steps | same numbers | study | -
faults.hang_timeout_seconds | takes effect | study | -
faults.non_finite | takes effect | study | -
faults.max_skipped_steps | takes effect | study | -
faults.loss_spike | takes effect | study | -
faults.positive_log_ratio_floor | takes effect | study | -
faults.on_alarm | takes effect | study | -
logging.tensorboard | takes effect | - | -
logging.wandb | takes effect | - | -
logging.mlflow | takes effect | - | -
logging.progress_bar | takes effect | - | -
logging.sample_interval | takes effect | - | -
logging.sample_prompts | takes effect | - | -
logging.sample_grid | takes effect | - | -
logging.text_tokenizer | takes effect | - | -
logging.image_tokenizer | takes effect | - | -
"""
# Where the model's own rules leave no choice.
OTHER = {
    "model.name": "llamagen-b",
    "model.num_attention_heads": 2,
    "model.num_query_groups": 4,
    "model.max_position_embeddings": 26,
    "model.vocab_size": 500,
    "model.padded_vocab_size": 512,
    "reference.fp8_recipe": "blockwise",
    "training.fp8_recipe": "blockwise",
    "logging.sample_grid": [2, 4],
}
# With FP8 the recipe of the products counts, too.
BASE = ["model.name=llamagen-tiny", "model.num_query_groups=2", "training.precision=fp8", "data.path=digits"]


def another(kind, value):
    """A value of a type that differs from the one given."""
    if get_origin(kind) is Annotated:
        return another(kind.__origin__, value)
    if get_origin(kind) is Literal:
        return next(one for one in get_args(kind) if one != value)
    if get_origin(kind) is list:
        return [] if value else [get_args(get_args(kind)[0])[0]]
    if kind is str:
        return "elsewhere"
    if kind in (bool, int, float):
        return {bool: not value, int: (value or 191) + 1, float: (value or 1.0) / 2}[kind]
    return another(get_args(kind)[0], value)


def changed(config, section, name):
    """The configuration with another value of one key."""
    if f"{section}.{name}" == "objective.name":
        return dataclasses.replace(config, objective=OBJECTIVES["dpo"]())
    part = getattr(config, section)
    kind = get_type_hints(type(part), include_extras=True)[name]
    value = OTHER.get(f"{section}.{name}", another(kind, getattr(part, name)))
    assert value != getattr(part, name)
    return dataclasses.replace(config, **{section: dataclasses.replace(part, **{name: value})})


@pytest.fixture
def config(tmp_path):
    return load_config(None, [*BASE, f"training.output_dir={tmp_path}/run"])


@pytest.fixture
def saved(config, tmp_path):
    """The folder of a run that is continued."""
    root = tmp_path / "run" / layout.FOLDER
    partial = layout.partial_folder(root, 10)
    partial.mkdir(parents=True)
    layout.finalize(partial, root, 10, {"config": config_to_dict(explicit(config))})
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def paths_as_contents(monkeypatch):
    """Weights and data are where their paths say, and nothing need be there."""
    monkeypatch.setattr(caching.layout, "resolve", lambda path, key: path)
    monkeypatch.setattr(caching, "weights_fingerprint", lambda folder, key: folder)
    monkeypatch.setattr(caching, "_drawn", lambda config: config.model.init_method_std)
    monkeypatch.setattr("megatron_cca.training.resuming._fingerprint", lambda path, key: path)
    monkeypatch.setattr("megatron_cca.lab.studies.schedule._data_key", lambda name: name)


def identity(config):
    training = SimpleNamespace(
        fingerprint=lambda: config.data.path,
        num_repeated_images=lambda: 0,
        partners_fingerprint=lambda: config.data.partner_path,
    )
    validation = SimpleNamespace(
        fingerprint=lambda: config.validation.path,
        partners_fingerprint=lambda: config.validation.partner_path,
    )
    return caching.cache_identity(config, SimpleNamespace(training=training, validation=validation))


def is_refused(config):
    try:
        check_resume(config)
    except UserError:
        return True
    return False


def answers(config, section, name):
    """One line of EXPECTED, from what the code does with the key."""
    other = changed(config, section, name)
    effect = effects(config)[f"{section}.{name}"]
    resume = effect.resume.value
    assert is_refused(other) == (resume == "refused")
    study = "study" if digest(training_contents(other, None)) != digest(training_contents(config, None)) else "-"
    in_path, in_cache = numeric_path(other) != numeric_path(config), identity(other) != identity(config)
    assert not (in_path and in_cache) and (in_path or in_cache) == bool(effect.reference)
    return f"{section}.{name} | {resume} | {study} | {'path' if in_path else 'cache' if in_cache else '-'}"


def test_every_list_answers_as_the_table_says(config, saved):
    lines = EXPECTED.split("\n")[1:-1]
    assert [answers(config, *line.partition(" ")[0].split(".")) for line in lines] == lines
    assert len(lines) == 123


@strict
class MoreTraining(TrainingConfig):
    """With a key that declares nothing."""

    new: int = 3


@strict
class Undeclared(Config):
    training: MoreTraining = section(MoreTraining)


@strict
class MoreData(DataConfig):
    """With a key of each kind."""

    numbers: int = key(3, Affects.NUMBERS, reference=True)
    last_bits: int = key(3, Affects.LAST_BITS, reference=True)
    speed: int = key(3, Affects.SPEED, study=False)
    output: list[Literal["a"]] = key([], Affects.OUTPUT)


@strict
class Declared(Config):
    data: MoreData = section(MoreData)


def test_a_key_that_declares_nothing_is_named():
    with pytest.raises(TypeError, match=r"^training\.new: does not say what it affects; "):
        effects(Undeclared())
    with pytest.raises(TypeError, match=r"^training\.new: "):
        training_contents(Undeclared(), None)


NEW = """
data.numbers | refused | study | cache
data.last_bits | same numbers | study | path
data.speed | same numbers | - | -
data.output | takes effect | study | -
"""


def test_a_declared_key_has_its_answer_everywhere(saved, monkeypatch):
    """The checkpoint is of a version without these keys."""
    monkeypatch.setattr(load, "Config", Declared)
    config = load_config(None, [*BASE, f"training.output_dir={saved}"])
    lines = NEW.split("\n")[1:-1]
    assert [answers(config, *line.partition(" ")[0].split(".")) for line in lines] == lines
    assert Declared().data.output is not Declared().data.output
    with pytest.raises(UserError, match=r"^data.numbers: 4, but the run in .* was started with 3; set it so"):
        check_resume(changed(config, "data", "numbers"))


def test_a_name_in_place_of_a_value_is_one_of_the_caches(config):
    names = {one.reference for one in effects(config).values() if isinstance(one.reference, str)}
    assert names and names <= identity(config).keys()


def test_a_section_says_it_for_keys_that_do_not():
    found = effects(Config())
    assert found["faults.on_alarm"].affects is Affects.OUTPUT
    assert found["faults.non_finite"].affects is Affects.NUMBERS
