# Two images; both run as a user without privileges, or as any other: `docker run --user "$(id -u):$(id -g)"`.
#
#   docker build --target cpu -t megatron-cca:cpu .      the demo and all tools on a laptop
#   docker run --rm --init -v "$PWD/runs:/workspace/runs" megatron-cca:cpu
#
#   docker build -t megatron-cca .                       the default: NVIDIA's PyTorch image, for GPUs
#   docker run --rm --init --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --stop-timeout 600 \
#       -v /data:/workspace/data -v /runs:/workspace/runs megatron-cca \
#       torchrun --nproc_per_node 8 examples/pretrain_cca_emu3.sh --config /workspace/data/mine.yaml
#
# NCCL talks through shared memory within a machine: Docker's 64 MB of it are too little, hence --ipc host (or --shm-size
# 16g). RDMA pins memory, hence memlock; it also wants --device /dev/infiniband. Over several machines add --network host,
# and NCCL_SOCKET_IFNAME where there is more than one interface; NCCL_DEBUG=INFO says which transport NCCL chose.
# --stop-timeout: a run that is told to stop finishes its step and saves; Docker kills after 10 seconds otherwise.
# A folder that is mounted must be writable for the user of the container.

# All that the CPU image runs on is installed in a stage of its own; from it goes the finished venv alone.
FROM python:3.12.12-slim-trixie AS cpu-packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/megatron_cca
COPY constraints.txt ./
# The registry's torch brings about 3 GB of CUDA libraries. torchvision must be of the same build: the registry's does not
# load beside this torch.
RUN grep -E '^(torch|torchvision)==' constraints.txt > torch.txt \
    && python -m pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu -r torch.txt
# What is depended on before the sources, which change more often. Megatron-Core imports Triton, which a torch without CUDA
# does not bring; what it compiles with for GPUs is half of it and stays out.
COPY setup.py pyproject.toml ./
COPY megatron_cca/__init__.py megatron_cca/
RUN touch README.md \
    && python -m pip install --no-cache-dir --only-binary :all: -c constraints.txt '.[data,eval,hf]' triton \
    && rm -r /opt/venv/lib/python3.12/site-packages/triton/backends/nvidia/bin \
        /opt/venv/lib/python3.12/site-packages/triton/backends/nvidia/lib \
        /opt/venv/lib/python3.12/site-packages/triton/backends/amd/lib
COPY README.md ./
# megatron_cca/examples is a link to them.
COPY examples examples
COPY megatron_cca megatron_cca
RUN python -m pip install --no-cache-dir --no-deps .

FROM python:3.12.12-slim-trixie AS cpu
LABEL org.opencontainers.image.title="megatron_cca, CPU" \
      org.opencontainers.image.description="Condition Contrastive Alignment on Megatron-Core: the demo and all tools, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
# getpass and libraries that keep caches ask for HOME and USER where the uid has no entry in /etc/passwd.
RUN useradd --uid 10001 --gid 0 --home-dir /home/cca --no-create-home cca \
    && install -d -m 1777 /home/cca /workspace/data /workspace/runs
COPY --from=cpu-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/cca \
    USER=cca
WORKDIR /opt/megatron_cca
COPY LICENSE ./
COPY tools tools
COPY examples examples
RUN ln -s /workspace/data data && ln -s /workspace/runs runs
VOLUME ["/workspace/data", "/workspace/runs"]
USER 10001:0
CMD ["python", "examples/quickstart/run.py"]

# NVIDIA's image brings Python 3.12, torch, Transformer Engine, apex and DALI, built for each other.
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS gpu
LABEL org.opencontainers.image.title="megatron_cca" \
      org.opencontainers.image.description="Condition Contrastive Alignment on Megatron-Core, on NVIDIA's PyTorch image" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 10001 --gid 0 --home-dir /home/cca --no-create-home cca \
    && install -d -m 1777 /home/cca /workspace/data /workspace/runs
WORKDIR /opt/megatron_cca
COPY docker/image_constraints.py docker/
COPY constraints.txt setup.py pyproject.toml ./
COPY megatron_cca/__init__.py megatron_cca/
# NVIDIA's own constraints (PIP_CONSTRAINT=/etc/pip/constraint.txt) stay in force, but have been empty in some releases.
RUN python docker/image_constraints.py write constraints.txt /etc/pip/megatron_cca.txt \
    && touch README.md \
    && python -m pip install --no-cache-dir -c /etc/pip/megatron_cca.txt '.[data,eval,hf]' \
    && python docker/image_constraints.py check /etc/pip/megatron_cca.txt
COPY README.md LICENSE ./
COPY megatron_cca megatron_cca
RUN python -m pip install --no-cache-dir --no-deps -e .
COPY tools tools
COPY examples examples
COPY benchmarks benchmarks
RUN ln -s /workspace/data data && ln -s /workspace/runs runs
ENV HOME=/home/cca \
    USER=cca
VOLUME ["/workspace/data", "/workspace/runs"]
USER 10001:0
# NVIDIA's entrypoint stays: it warns of a driver that is too old, then runs the command.
CMD ["torchrun", "examples/pretrain_cca_emu3.sh", "--help"]
