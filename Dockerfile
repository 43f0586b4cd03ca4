# anodiff with the checkpoints that come with it. It runs without a network, on a read-only root, as any user:
#   docker build --tag anodiff .                                              # for NVIDIA GPUs and CPUs
#   docker build --build-arg TORCH_INDEX=ADDRESS --tag anodiff:cpu .          # CPUs alone, 2.8 GB
# ADDRESS is the package index that pytorch.org, "Get Started", names for CPU. How to run it: docs/scaling.md.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=""
COPY . /src
RUN python3 -m venv /opt/anodiff \
    && /opt/anodiff/bin/pip install --no-cache-dir --constraint /src/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "/src[dicom]"

FROM ${BASE}
# `--fast` compiles networks, which needs a C compiler on GPUs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/anodiff /opt/anodiff
# Only the temporary folder is written to; packages in a home that is mounted are left alone.
ENV PATH=/opt/anodiff/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONNOUSERSITE=1 \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton
USER 65534:65534
WORKDIR /data
ENTRYPOINT ["anodiff"]
CMD ["--help"]
