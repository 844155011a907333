"""What ranks do to see whether time and memory are told right; each function returns plain data."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cca.config.load import load_config
from megatron_cca.lab.planner.dry_run import counted_step, dry_run
from megatron_cca.lab.planner.fake_cluster import fake_job, fake_tensors
from megatron_cca.lab.planner.hardware import DEFAULT, GPUS, Cluster
from megatron_cca.lab.planner.observer import Observer
from megatron_cca.lab.planner.throughput import predict_step
from megatron_cca.lab.planner.workload import Workload
from megatron_cca.lab.scaling.waiting import timed_collectives
from megatron_cca.parallel.ranks import initialize_distributed


def late_ranks(settings):
    """What is timed on every rank where rank 0 is late: an all-reduce within a stage, then a message between two."""
    return {
        "one stage": _late(settings["late"], lambda rank: 0, lambda: dist.all_reduce(torch.ones(8))),
        "two stages": _late(settings["late"], lambda rank: rank, _message),
    }


def _late(seconds, stage_of, communicate):
    dist.barrier()
    with timed_collectives(stage_of) as timer:
        # Once in time, which shows what the transfer itself takes.
        for late in (0.0, seconds):
            time.sleep(late if dist.get_rank() == 0 else 0.0)
            communicate()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [[span.kind, span.crosses_stages, span.exposed] for span in timer.spans])
    return everyone


def _message():
    if dist.get_world_size() > 1:
        dist.send(torch.ones(8), 1) if dist.get_rank() == 0 else dist.irecv(torch.ones(8), 0).wait()


def even_pipeline(settings):
    """By number of microbatches: what is timed on every rank of a pipeline whose stages all sleep equally long."""
    initialize_distributed(load_config(None, [f"parallel.pipeline_model_parallel_size={dist.get_world_size()}"]))
    stage, found = _SleepingStage(settings["seconds"]), {}
    for microbatches in settings["microbatches"]:
        dist.barrier()
        with timed_collectives(lambda rank: rank) as timer:
            started = time.perf_counter()
            get_forward_backward_func()(
                forward_step_func=lambda _, model: (model(), lambda output: (output.sum(), {})),
                data_iterator=iter([]),
                model=[stage],
                num_microbatches=microbatches,
                seq_length=4,
                micro_batch_size=1,
                forward_only=False,
            )
            # As a step's end does: the last stage is done first.
            dist.all_reduce(torch.ones(1))
            seconds = time.perf_counter() - started
        spans = [[span.kind, span.crosses_stages, span.exposed] for span in timer.spans]
        found[microbatches] = [None] * dist.get_world_size()
        dist.all_gather_object(found[microbatches], {"seconds": seconds, "spans": spans})
    return found


class _SleepingStage(torch.nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=dist.get_world_size(),
            pipeline_dtype=torch.float32,
        )
        self.seconds, self.received = seconds, None
        self.weight = torch.nn.Parameter(torch.ones(()))

    def set_input_tensor(self, tensors):
        self.received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self):
        received = torch.ones(4, 1, 8) if self.received is None else self.received
        return _Sleep.apply(received * self.weight, self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor, seconds):
        context.seconds = seconds
        time.sleep(seconds)
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(2 * context.seconds)
        return gradient, None


def counted_steps(settings):
    config, workload = _planned(settings)
    initialize_distributed(config)
    replicas = parallel_state.get_data_parallel_world_size()
    microbatches = config.training.global_batch_size // config.training.micro_batch_size // replicas
    with Observer() as observer:
        counted = counted_step(config, workload, observer, microbatches)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(counted))
    return everyone


def dry_runs(settings):
    dist.destroy_process_group()
    found = [_dry_run(job) for job in settings["jobs"]]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def planned_and_sent_bytes(settings):
    """By case: the bytes over a link that the time model has a rank wait for, and those that a dry run sends."""
    dist.destroy_process_group()
    # A byte takes a second.
    gpu = replace(GPUS["h100-80gb"], nvlink_bandwidth=1.0, network_bandwidth=1.0)
    exact = replace(DEFAULT, nvlink_efficiency=1.0, network_efficiency=1.0, collective_latency_seconds=0.0)
    workload, found = Workload(128, 96), {}
    for name, (overrides, part, groups) in settings["cases"].items():
        config = load_config(None, overrides)
        sent = dry_run(config, 2, 1, workload, like_gpu=False).traffic
        step = predict_step(config, Cluster(gpu, 2, 8), workload, exact)
        found[name] = [getattr(step, part), sum(_over_a_link(one) for one in sent if one.group in groups)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def _over_a_link(traffic):
    """Bytes in one direction between two ranks: half of a gather or scatter, all of a sum or of what is received."""
    weight = {"all_gather": 0.5, "reduce_scatter": 0.5, "all_reduce": 1.0, "recv": 1.0, "send": 1.0}
    return weight[traffic.operation] * traffic.num_bytes


def _dry_run(job):
    config, workload = _planned(job)
    if not job.get("run_all"):
        return asdict(dry_run(config, job["ranks"], job["rank"], workload, like_gpu=job["like_gpu"]))
    microbatches = config.training.global_batch_size // config.training.micro_batch_size
    with fake_job(0, 1):
        initialize_distributed(config)
        share = workload.image_tokens / workload.seq_length
        with fake_tensors(share, like_gpu=job["like_gpu"]) as observer:
            return asdict(counted_step(config, workload, observer, microbatches, run_all=True))


def _planned(job):
    return load_config(job["config"], job["overrides"]), Workload(*job["workload"])
