# Two images: `docker build --target cpu` for the demo on a laptop, the default for GPUs.

FROM python:3.12-slim AS cpu
RUN apt-get update \
    && apt-get install --no-install-recommends -y make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 user
USER user
WORKDIR /home/user/megatron_cca
COPY --chown=user . .
RUN make install
CMD ["make", "demo"]

# NVIDIA's image brings Python 3.12, torch, Transformer Engine and apex; they stay as they are.
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS gpu
RUN useradd --create-home --uid 10001 user
USER user
ENV PATH=/home/user/.local/bin:$PATH
WORKDIR /home/user/megatron_cca
COPY --chown=user . .
RUN python -m pip install --user --no-cache-dir --no-build-isolation -e '.[data,eval]'
CMD ["torchrun", "examples/pretrain_cca_emu3.sh", "--help"]
