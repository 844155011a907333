"""What the files of this package need of Megatron-Core 0.19.2 and Transformer Engine 2.11 to 2.19, by file.

``tests/unit/test_megatron_contract.py`` checks it; nothing else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_cca.megatron_compat import start


@dataclass(frozen=True)
class ReliedOn:
    """A name that must exist, and what else must be true of it.

    Attributes:
        name: the dotted name, beginning with the package.
        why: what the name does or why it is needed, in one line.
        parameters: all parameters of a function, in order. Used if the function is replaced or overridden.
        takes: some parameters of a function or class, those that are passed to it.
        has: attributes that an object has, or that the source of a class sets on ``self``.
        says: text that the source of a module, class or function must contain, because its behaviour is needed.
        equals: the value of a constant.
    """

    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    takes: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    equals: object = None


def _core(name: str, why: str, **demands: Any) -> ReliedOn:
    return ReliedOn(f"megatron.core.{name}", why, **demands)


def _engine(name: str, why: str, **demands: Any) -> ReliedOn:
    return ReliedOn(f"transformer_engine.{name}", why, **demands)


RELIED_ON: dict[str, tuple[ReliedOn, ...]] = {
    "start": (
        _core(
            "extensions.transformer_engine.HAVE_TE",
            "tells whether Megatron-Core has bound Transformer Engine's kernels",
        ),
        _core(
            "dist_checkpointing.strategies.nvrx",
            "falls back to Megatron-Core's own writer where the other one cannot be imported",
            says=("nvidia_resiliency_ext.checkpointing.async_ckpt.core", "except (ImportError"),
        ),
        *(
            _core(name, "asks CUDA for memory or streams", has=("torch",), says=(word,))
            for name, word in start.MODULES.items()
        ),
        _core(
            "tensor_parallel.random._get_cuda_rng_state",
            "the tracker of random states reads a GPU's",
            parameters=("device", "clone", "graph_safe"),
        ),
        _core(
            "tensor_parallel.random._set_cuda_rng_state",
            "the tracker of random states writes a GPU's",
            parameters=("new_state", "device", "graph_safe"),
        ),
        _core(
            "optimizer.optimizer",
            "compares this string with what Tensor.type() answers, see platform/cpu.py",
            says=("cuda.FloatTensor'", "cuda.BFloat16Tensor'"),
        ),
        *tuple(ReliedOn(name, "logs under this name") for name in start.LOG_RECORDS if name.startswith("megatron.")),
        _core("optimizer.Adam", "the class that get_megatron_optimizer makes"),
        _core("optimizer.USING_PYTORCH_OPTIMIZER", "says whether Megatron-Core has found no fused Adam"),
        _core("optimizer.distrib_optimizer.Adam", "the class that the distributed optimizer accepts"),
        _core(
            "optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
            "without it the distributed optimizer counts steps per parameter",
        ),
        _core("optimizer.distrib_optimizer.USING_APEX_OPTIMIZER", "without it a checkpoint lacks the count of steps"),
    ),
    "optimizer_state": (
        _core(
            "optimizer.distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero",
            "joins the buckets of a buffer",
            takes=("empty_data",),
        ),
        _core(
            "optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable",
            "takes each parameter's part from what was joined",
            says=("self.get_parameter_state_dp_zero(",),
        ),
        _core(
            "optimizer.distrib_optimizer.DistributedOptimizer",
            "the buffers whose buckets are joined",
            has=("buffers",),
        ),
        _core("distributed.param_and_grad_buffer._ParamAndGradBuffer", "a buffer", has=("buckets", "numel")),
        _core(
            "distributed.param_and_grad_buffer._ParamAndGradBucket",
            "a bucket of a buffer",
            has=("offset", "numel_unpadded"),
        ),
        _core("optimizer.optimizer.ChainedOptimizer", "several optimizers", has=("chained_optimizers",)),
        _core(
            "optimizer.cpu_offloading.HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers",
            "writes the groups of the whole over those of the parts before each step",
        ),
        _core(
            "optimizer.distrib_optimizer",
            "a parameter keeps its shard, which keeps the parameter",
            says=("model_param.main_param = shard_main_param",),
        ),
    ),
    "layers": (
        _core("tensor_parallel.layers._grad_accum_fusion_available", "says whether apex can fuse gradients"),
        _core(
            "distributed.DistributedDataParallel._make_forward_pre_hook",
            "waits for a module's own weights; torch keeps it among the module's hooks",
            parameters=("self",),
            says=("def hook(module, *unused)",),
        ),
        _core(
            "distributed.DistributedDataParallel.enable_forward_pre_hook",
            "registers that hook",
            says=("register_forward_pre_hook(",),
        ),
        _core(
            "distributed.DistributedDataParallel._make_backward_post_hook",
            "adds no gradient that is in main_grad already, see platform/operations.py",
            says=("param.grad_added_to_main_grad", "zero_out_wgrad"),
        ),
        _core(
            "distributed.DistributedDataParallel.start_param_sync",
            "gathers updated weights at once",
            takes=("force_sync",),
        ),
        _core(
            "distributed.DistributedDataParallel.disable_forward_pre_hook",
            "lets a capture do without gathering",
            takes=("param_sync",),
        ),
        _core("distributed.DistributedDataParallel", "has the gradients of a chunk", has=("buffers", "no_sync")),
        _core("distributed.param_and_grad_buffer._ParamAndGradBuffer", "holds gradients", has=("grad_data",)),
        _engine(
            "pytorch.cpp_extensions.general_gemm",
            "adds a product to a sum, see platform/operations.py",
            takes=("out_dtype", "layout", "out", "accumulate"),
        ),
        _engine("pytorch.is_fp8_available", "says what a GPU lacks", takes=("return_reason",)),
        _engine(
            "pytorch.is_fp8_block_scaling_available",
            "says what a GPU lacks",
            takes=("return_reason",),
        ),
        _engine(
            "pytorch.Linear",
            "a layer that can add its gradient to main_grad",
            has=("fuse_wgrad_accumulation",),
        ),
    ),
    "decoding": (
        _core(
            "models.gpt.GPTModel",
            "the parts of a chunk in the order of its forward pass; rotary_pos_emb is replaced",
            has=("embedding", "decoder", "output_layer", "rotary_pos_emb"),
        ),
        _core(
            "models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.get_emb",
            "computes the angles of all positions",
            parameters=("self", "max_seq_len", "offset"),
        ),
        _core(
            "transformer.attention.Attention",
            "builds a core attention by these names and calls it with what is rotated",
            says=("self.core_attention = submodules.core_attention(", "attention_type=self.attention_type"),
        ),
        _core(
            "transformer.transformer_layer.TransformerLayer",
            "builds norms by these names",
            has=("self_attention", "mlp"),
            says=("hidden_size=self.config.hidden_size", "eps=self.config.layernorm_epsilon"),
        ),
        _engine(
            "pytorch.LayerNormLinear",
            "a layer that norms its own input",
            has=("normalization", "zero_centered_gamma", "eps"),
            says=("layer_norm_weight",),
        ),
        _core(
            "models.gpt.GPTModel",
            "rotates nothing where this is none, and sends tensors between stages",
            has=("position_embedding_type", "pre_process", "post_process", "decoder", "set_input_tensor"),
        ),
        _core(
            "models.gpt.GPTModel.forward",
            "hands hidden states to a function in place of the LM head",
            takes=("input_ids", "position_ids", "attention_mask", "output_processor", "output_processor_context"),
        ),
        _core(
            "models.gpt.GPTModel._preprocess",
            "computes angles only for rope",
            says=("if self.position_embedding_type == 'rope'",),
        ),
        _core("transformer.attention.SelfAttention", "whose attention is replaced", has=("core_attention",)),
        _core(
            "transformer.transformer_layer.TransformerLayer",
            "tells the layers of a rank apart",
            has=("self_attention", "layer_number"),
        ),
        _core(
            "models.common.embeddings.language_model_embedding.LanguageModelEmbedding",
            "splits its output over the ranks",
            has=("scatter_to_sequence_parallel", "reduce_scatter_embeddings"),
        ),
        _core(
            "tensor_parallel.layers.ColumnParallelLinear",
            "splits or gathers a sequence",
            has=("sequence_parallel",),
        ),
        _core(
            "tensor_parallel.layers.RowParallelLinear",
            "splits or gathers a sequence",
            has=("sequence_parallel",),
        ),
    ),
    "program_state": (
        _core(
            "num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR", "says whether one has been set already"
        ),
        _core(
            "num_microbatches_calculator.init_num_microbatches_calculator",
            "is called with positions",
            parameters=(
                "rank",
                "rampup_batch_size",
                "global_batch_size",
                "micro_batch_size",
                "data_parallel_size",
                "decrease_batch_size_if_needed",
                "step_batch_size_schedule",
                "seq_length",
            ),
        ),
        _core(
            "transformer.cuda_graphs.TECudaGraphHelper",
            "captures, after having asked for the number of microbatches",
            takes=("model", "config", "seq_length", "micro_batch_size", "optimizers"),
            has=("capture_finished", "create_cudagraphs", "cuda_graph_set_manual_hooks"),
        ),
        _core("transformer.cuda_graphs", "asks for it", says=("get_num_microbatches()",)),
        _engine(
            "pytorch.module.base.initialize_ub",
            "makes the buffers",
            takes=("shape", "tp_size", "quantization_modes", "bootstrap_backend"),
        ),
        _engine("pytorch.module.base.UserBufferQuantizationMode", "the kinds of buffers", has=("FP8", "NONE")),
    ),
    "fake_tensors": (
        _core("optimizer.clip_grads.l2_norm_impl", "makes a tensor of numbers"),
        _core("fusions.fused_bias_swiglu.swiglu", "is compiled", parameters=("y",)),
        _core("fusions.fused_bias_swiglu.swiglu_back", "is compiled", parameters=("g", "y")),
    ),
    "__init__": (
        _core(
            "dist_checkpointing.core.CONFIG_FNAME", "the name of the file that marks the format", equals="metadata.json"
        ),
        _core(
            "dist_checkpointing.core.CheckpointingConfig",
            "what stands in that file",
            parameters=("sharded_backend", "sharded_backend_version"),
        ),
        _core(
            "dist_checkpointing.strategies.common.COMMON_STATE_FNAME", "a pickle that is refused", equals="common.pt"
        ),
        _core(
            "dist_checkpointing.serialization.save",
            "the key of what is not sharded",
            says=('key="common_state"',),
        ),
        _core(
            "transformer.transformer_block.TransformerBlock",
            "the keys of layers and final norm",
            has=("layers", "final_layernorm"),
        ),
    ),
    "checkpoints": (
        _core(
            "dist_checkpointing.mapping.ShardedObject",
            "how an extra state stands in a sharded state",
            takes=("key", "data", "global_shape", "global_offset", "replica_id"),
            has=("unique_key",),
        ),
        _core("safe_globals.SafeUnpickler._SAFE_CLASSES", "the classes that an FP8 recipe consists of"),
        _engine("common.recipe.DelayedScaling", "the recipe whose states are pickled"),
        _core(
            "dist_checkpointing.strategies.torch",
            "reads the index through torch's reader",
            says=("fs_reader.read_metadata()",),
        ),
        _core(
            "dist_checkpointing.strategies.torch.MCoreLoadPlanner",
            "what is no tensor goes through torch's planner, and where that puts it",
            has=("flatten_state_dict", "original_state_dict", "mappings", "state_dict", "load_bytes"),
        ),
        _core(
            "dist_checkpointing.strategies.filesystem_async._results_queue",
            "the queue that the next save answers through",
        ),
        _core(
            "dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
            "takes a queue that is there already",
            says=("if _results_queue is None",),
        ),
        _core(
            "dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.write_preloaded_data",
            "writes one file and returns its error as the second of two results",
            says=("local_output = (local_proc_idx, e)", "return local_output"),
        ),
        _core(
            "dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.finish",
            "writes the index on rank 0",
            parameters=("self", "metadata", "results"),
        ),
        _core(
            "dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.get_save_function_and_args",
            "the second argument of the function that writes is what is preloaded",
            says=("[torch.distributed.get_rank(), self.write_buckets, self.results_queue]",),
        ),
        _core(
            "dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
            "where the writer is known that will write the index",
            parameters=("self", "writer", "save_state_dict_ret", "async_strategy"),
        ),
        _core(
            "dist_checkpointing.strategies.async_utils.AsyncRequest",
            "what there is to write",
            has=("async_fn", "async_fn_args", "finalize_fns", "preload_fn"),
        ),
        _core(
            "dist_checkpointing.serialization.save",
            "the last thing to be done marks the format on rank 0, and then all ranks meet",
            says=("async_request.finalize_fns.append(metadata_finalize_fn)",),
        ),
    ),
    "indexed_dataset": (
        _core("datasets.indexed_dataset._INDEX_HEADER", "an index begins with it", equals=b"MMIDIDX\x00\x00"),
        _core(
            "datasets.indexed_dataset.DType.code_from_dtype",
            "the code of a type in an index",
            takes=("value",),
        ),
        _core(
            "datasets.indexed_dataset._BinReader.read",
            "what reads tokens",
            parameters=("self", "dtype", "count", "offset"),
        ),
        _core(
            "datasets.indexed_dataset.IndexedDataset",
            "reads through an attribute that can be replaced",
            takes=("path_prefix", "mmap"),
            has=("bin_reader",),
        ),
        _core(
            "datasets.indexed_dataset.IndexedDatasetBuilder",
            "keeps what it writes into the index",
            takes=("bin_path", "dtype"),
            has=("data_file", "sequence_lengths", "document_indices"),
        ),
        _core(
            "datasets.indexed_dataset.IndexedDatasetBuilder.add_index",
            "what append_tokens does without collecting garbage",
            says=(
                "self.sequence_lengths.extend(",
                "self.document_indices.extend(",
                "shutil.copyfileobj(f, self.data_file)",
            ),
        ),
    ),
}
