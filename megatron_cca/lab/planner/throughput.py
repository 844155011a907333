"""Seconds of a training step by cause, computed from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_cca.config import Config
from megatron_cca.lab.planner.costs import Compute, Group
from megatron_cca.lab.planner.hardware import DEFAULT, Calibration, Cluster, lost_share, lost_spread
from megatron_cca.lab.planner.sizes import sizes_of
from megatron_cca.lab.planner.workload import Workload, average_peak, flops_by_precision, mfu, row_products
from megatron_cca.models.architecture import has_engine_attention
from megatron_cca.training import reference_settings, rows_per_sample, uses_reference_pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the busiest rank by cause; the parts add up to ``total``.

    Attributes:
        compute: forward and backward of the policy's layers.
        recompute: recomputation of layers in backward.
        head: forward and backward of the policy's log-probabilities.
        reference: the reference's layers and log-probabilities, and the wait for its weights.
        bubble: the wait for other pipeline stages while the pipeline fills and drains.
        tensor_parallel: exposed communication within layers.
        context_parallel: exposed communication of keys and values.
        pipeline: exposed messages between stages.
        data_parallel: exposed communication of gradients and parameters.
        optimizer: the optimizer's update.
        overhead: time that does not depend on sizes, and the wait for kernel launches.
        cluster: stragglers, congestion and similar losses, from published runs; see ``hardware.py``.
        samples: samples of the global batch.
        tokens_per_gpu: positions that the policy computes in a step, divided by the number of GPUs.
        model_flops_per_gpu: FLOPs of a step on one GPU, as ``flops.model_flops`` counts them.
        peak_flops: peak FLOP/s of the GPU, averaged over the precisions of the step; see ``flops.average_peak``.
        relative_error: one standard deviation of the error of all parts but ``cluster``, as a share.
        cluster_spread: one standard deviation of the differences between clusters, as a share of the step.
    """

    compute: float
    recompute: float
    head: float
    reference: float
    bubble: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    data_parallel: float
    optimizer: float
    overhead: float
    cluster: float
    samples: int
    tokens_per_gpu: float
    model_flops_per_gpu: float
    peak_flops: float
    relative_error: float
    cluster_spread: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def error(self) -> float:
        """Two standard deviations as a share of ``total``: the model's error and the clusters' spread combined."""
        return 2 * math.hypot(self.relative_error, self.cluster_spread)

    @property
    def low(self) -> float:
        """Seconds of the step, less two standard deviations."""
        return self.total * max(0.0, 1 - self.error)

    @property
    def high(self) -> float:
        """Seconds of the step, plus two standard deviations."""
        return self.total * (1 + self.error)

    @property
    def samples_per_second(self) -> float:
        """Samples per second of the whole job."""
        return self.samples / self.total

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Positions of the policy's rows per second and GPU, padding included."""
        return self.tokens_per_gpu / self.total

    @property
    def model_flops_per_second(self) -> float:
        """FLOP/s of one GPU."""
        return self.model_flops_per_gpu / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, as ``flops.MFU_MEANS`` defines it."""
        return mfu(self.model_flops_per_gpu, self.total, self.peak_flops)

    @property
    def communication(self) -> float:
        """Seconds of exposed communication of all kinds."""
        return self.tensor_parallel + self.context_parallel + self.pipeline + self.data_parallel


PARTS = tuple(field.name for field in fields(StepTime))[:12]


_FP32 = 4


def predict_step(
    config: Config,
    cluster: Cluster,
    workload: Workload,
    calibration: Calibration = DEFAULT,
    *,
    head_in_tiles: bool = True,
) -> StepTime:
    """Predict the time of a step.

    Args:
        config: configuration of the run; must have passed ``training.checks.check_new_run``.
        cluster: the cluster, with a process on each GPU.
        workload: the rows of a microbatch.
        calibration: calibration of the GPU.
        head_in_tiles: whether the head is this project's; other programs keep its logits for backward.

    Raises:
        UserError: the GPU does not support a precision of the run.
    """
    return _Step(config, cluster, workload, calibration, head_in_tiles).predict()


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass of one microbatch on the last stage.

    Attributes:
        layers: computation of the rank's layers.
        recompute: recomputation of these layers.
        head: computation of the log-probabilities, which only the last stage does.
        tensor_parallel, context_parallel: exposed communication.
        head_tensor_parallel: exposed communication of the head.
        send: exposed messages to the next stage and back.
        overhead: kernel launches.
    """

    layers: float
    recompute: float
    head: float
    tensor_parallel: float
    head_tensor_parallel: float
    context_parallel: float
    send: float
    overhead: float

    @property
    def other_stage(self) -> float:
        """Seconds of a stage without the head."""
        return self.layers + self.recompute + self.tensor_parallel + self.context_parallel + self.overhead


class _Step:
    def __init__(
        self, config: Config, cluster: Cluster, workload: Workload, calibration: Calibration, head_in_tiles: bool
    ) -> None:
        self.config, self.cluster, self.workload, self.calibration = config, cluster, workload, calibration
        self.sizes = sizes = sizes_of(config, cluster.num_gpus, workload)
        trains_weights = config.lora.dim is None
        self.policy = Compute(sizes, cluster.gpu, calibration, config, config.training, trains_weights, head_in_tiles)
        self.tp = self._group(sizes.tensor, 1)
        self.cp = self._group(sizes.context, sizes.tensor)
        # The ranks that share a sequence sum their gradients, too.
        self.dp = self._group(sizes.context * sizes.data, sizes.tensor)
        self.pp = self._group(sizes.pipeline, sizes.tensor * sizes.context * sizes.data)

    def _group(self, size: int, stride: int) -> Group:
        return Group(size, stride, self.cluster, self.calibration)

    def predict(self) -> StepTime:
        sizes, calibration = self.sizes, self.calibration
        count, fill = sizes.microbatches, (sizes.pipeline - 1) / sizes.chunks
        policy, passes = self._policy_pass(), []
        passes.append(policy)
        reference = None
        if uses_reference_pass(self.config):
            reference = self._reference_pass()
            passes.append(reference)
        samples = self.config.training.global_batch_size
        gpus = self.cluster.num_gpus
        flops = flops_by_precision(self.config, sizes.architecture, self.workload)
        step = StepTime(
            compute=count * policy.layers,
            recompute=count * policy.recompute,
            head=count * policy.head,
            reference=count * (reference.layers + reference.head) if reference else 0.0,
            bubble=fill * sum(one.other_stage for one in passes),
            tensor_parallel=count * sum(one.tensor_parallel + one.head_tensor_parallel for one in passes),
            context_parallel=count * sum(one.context_parallel for one in passes),
            pipeline=count * sum(one.send for one in passes),
            data_parallel=self._data_parallel(policy),
            optimizer=self._optimizer(),
            overhead=count * sum(one.overhead for one in passes) + calibration.step_overhead_seconds,
            samples=samples,
            tokens_per_gpu=samples * rows_per_sample(self.config) * self.workload.seq_length / gpus,
            model_flops_per_gpu=samples * sum(flops.values()) / gpus,
            peak_flops=average_peak(flops, self.cluster.gpu.peak_flops),
            relative_error=calibration.relative_error,
            cluster=0.0,
            cluster_spread=lost_spread(self.cluster),
        )
        return replace(step, cluster=lost_share(self.cluster) * step.total)

    def _policy_pass(self) -> _Pass:
        compute, sizes = self.policy, self.sizes
        forward, backward, recompute = compute.layer_forward(), compute.layer_backward(), compute.recomputation()
        again = self.config.training.recompute_granularity == "full"
        # Forward and backward move the same number of bytes. Recomputation moves them once more.
        tensor_parallel = self._tensor_parallel((2 + again * recompute / (sizes.layers * forward)) * sizes.layers)
        hidden = sizes.image_tokens * sizes.architecture.hidden_size
        head_gradient = 2 * self.tp.collective(_FP32 * hidden)
        return _Pass(
            layers=sizes.layers * (forward + backward),
            recompute=recompute,
            head=compute.head_forward() + compute.head_backward(),
            tensor_parallel=tensor_parallel,
            head_tensor_parallel=self._gather_hidden(compute) + head_gradient,
            context_parallel=sizes.layers * sum(self._keys_and_values(compute, backward=one) for one in (False, True)),
            send=self._sends(2),
            overhead=self._launching(sizes.layers * (forward + backward) + recompute, 3),
        )

    def _reference_pass(self) -> _Pass:
        config, sizes = self.config, self.sizes
        policy = self.policy
        settings = reference_settings(config)
        compute = Compute(sizes, policy.gpu, self.calibration, config, settings, False, policy.head_in_tiles)
        layers, head = sizes.layers * compute.layer_forward(), compute.head_forward()
        if config.reference.fp8_param:
            layers += sizes.layers * compute.unpacking()
        if config.reference.strategy == "offload":
            layers, head = self._streamed(compute, layers, head)
        return _Pass(
            layers=layers,
            recompute=0.0,
            head=head,
            tensor_parallel=self._tensor_parallel(sizes.layers),
            head_tensor_parallel=self._gather_hidden(compute),
            context_parallel=sizes.layers * self._keys_and_values(compute, backward=False),
            send=self._sends(1),
            overhead=self._launching(layers, 1),
        )

    def _streamed(self, compute: Compute, layers: float, head: float) -> tuple[float, float]:
        """Return the seconds of the layers and of the head while their weights arrive from the host.

        The weights of a layer arrive during the computation of the layer before. Those of the head arrive during the
        last layer.
        """
        sizes = self.sizes
        number = 1 if self.config.reference.fp8_param else compute.number_bytes
        arriving = self._from_host(number * sizes.layer_weights)
        head_arriving = self._from_host(compute.number_bytes * sizes.head_weights)
        return max(layers, sizes.layers * arriving), max(head, head_arriving)

    def _from_host(self, moved: float) -> float:
        return moved / (self.cluster.gpu.host_bandwidth * self.calibration.host_efficiency)

    def _tensor_parallel(self, layer_passes: float) -> float:
        """Return the exposed seconds of tensor-parallel communication for so many passes through a layer.

        A pass through a layer has two all-reduces. With sequence parallelism, four collectives move the same bytes.
        Backward gathers some of them once more. Megatron hides this behind a product.
        """
        sizes, number_bytes = self.sizes, self.policy.number_bytes
        moved = number_bytes * sizes.tokens * sizes.architecture.hidden_size
        # What is computed once for each row is gathered before each layer, or its gradients are scattered after it.
        outputs = sum(product.outputs for product in row_products(sizes.architecture))
        of_rows = self.tp.collective(number_bytes * sizes.rows * outputs) if outputs else 0.0
        exposed = 1.0
        if self.config.parallel.tp_comm_overlap:
            exposed -= self.calibration.tensor_parallel_overlap
        return exposed * 4 * layer_passes * self.tp.collective(moved) + layer_passes * of_rows

    def _gather_hidden(self, compute: Compute) -> float:
        if not self.config.parallel.sequence_parallel:
            return 0.0
        return self.tp.collective(compute.number_bytes * self.sizes.tokens * self.sizes.architecture.hidden_size)

    def _keys_and_values(self, compute: Compute, *, backward: bool) -> float:
        """Return the exposed seconds of a layer's keys and values, in forward or in backward.

        The attention of torch gathers them. Transformer Engine's passes them around a ring.
        """
        architecture = self.sizes.architecture
        width = 2 * architecture.kv_projection_size
        part = compute.number_bytes * self.sizes.tokens * width / self.sizes.tensor
        impl, precision = self.config.model.transformer_impl, compute.settings.precision
        if not has_engine_attention(impl, architecture.kv_channels, precision):
            # Backward still has the keys and values. It scatters their gradients.
            return self.cp.collective(part * self.sizes.context)
        # In backward they go around the ring again, with their gradients. Attention hides the ring in both passes.
        ring = (1 + backward) * (self.sizes.context - 1) * self.cp.send(part)
        return max(0.0, ring - compute.attention_seconds(backward=backward))

    def _sends(self, directions: int) -> float:
        """Return the exposed seconds of a microbatch's messages between stages."""
        sizes, parallel = self.sizes, self.config.parallel
        overlaps = parallel.overlap_p2p_comm
        if sizes.pipeline == 1 or (sizes.chunks > 1 if overlaps is None else overlaps):
            return 0.0
        divided = sizes.tensor if parallel.sequence_parallel else 1
        message = self.policy.number_bytes * sizes.tokens * sizes.architecture.hidden_size / divided
        return directions * sizes.chunks * self.pp.send(message)

    def _launching(self, seconds: float, forwards: int) -> float:
        launching = forwards * self.sizes.layers * self.calibration.layer_launch_seconds
        if self.config.kernels.cuda_graph_impl != "none":
            launching = 0.0
        return max(0.0, launching - seconds) + self.calibration.microbatch_overhead_seconds

    def _data_parallel(self, policy: _Pass) -> float:
        """Return the exposed seconds of data-parallel communication.

        Gradients follow the last microbatch. Parameters come before the first microbatch of the next step.
        """
        options = self.config.optimizer
        if self.config.lora.dim is not None:
            return 0.0
        weights = self.sizes.trained_weights
        in_fp32 = self.config.training.precision == "fp32" or options.grad_reduce_in_fp32
        gradient_bytes = (4 if in_fp32 else 2) * weights
        backward = 2 / 3 * policy.layers + policy.recompute + policy.head
        if not options.use_distributed_optimizer:
            return self._hidden(2 * self.dp.collective(gradient_bytes), backward, options.overlap_grad_reduce)
        # The replicas of the sharded state sum their shards with each other.
        shards = self._group(self._shards(), self.sizes.tensor)
        replicas = self._group(options.num_distributed_optimizer_instances, shards.stride * shards.size)
        gradients = shards.collective(gradient_bytes) + 2 * replicas.collective(gradient_bytes / shards.size)
        parameters = shards.collective(self.policy.number_bytes * weights)
        return self._hidden(gradients, backward, options.overlap_grad_reduce) + self._hidden(
            parameters, policy.layers / 3, options.overlap_param_gather
        )

    def _shards(self) -> int:
        """Return the number of ranks that share the optimizer's state."""
        options = self.config.optimizer
        if not options.use_distributed_optimizer:
            return 1
        return self.dp.size // options.num_distributed_optimizer_instances

    def _hidden(self, seconds: float, behind: float, overlaps: bool) -> float:
        if not overlaps:
            return seconds
        return seconds - min(self.calibration.data_parallel_overlap * seconds, behind)

    def _optimizer(self) -> float:
        """Return the seconds of Adam's update of this rank's share, and of clearing the gradients."""
        options, weights = self.config.optimizer, self.sizes.trained_weights
        if self.config.lora.dim is not None:
            return 0.0
        share = weights / self._shards()
        # The gradient is read twice: for its norm and for the update. The weight and the moments are read and written.
        # The copy for the computation is written.
        update = 2 * _FP32 + 6 * _FP32 + (0 if self.config.training.precision == "fp32" else 2)
        on_host = options.optimizer_offload_fraction if options.optimizer_cpu_offload else 0.0
        seconds = self._memory(_FP32 * weights + (1 - on_host) * update * share)
        copies = self._from_host(2 * _FP32 * on_host * share)
        host = on_host * update * share / self.calibration.host_adam_bytes_per_second
        return seconds + (max(copies, host) if options.overlap_cpu_optimizer_d2h_h2d else copies + host)

    def _memory(self, moved: float) -> float:
        return moved / (self.cluster.gpu.memory_bandwidth * self.calibration.memory_efficiency)
