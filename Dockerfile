# syntax=docker/dockerfile:1
# An image with sail-train, sail-data and torch; docs/containers.md says how to build and run it.
#   docker build --tag sail:latest .
#   docker build --tag sail:cuda --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
# With NVIDIA's base image, which compares the driver and serves older ones, it is for clusters. On Debian's it trains on the
# CPU, and on GPUs that the container's engine hands in.

ARG DEBIAN=bookworm
ARG BASE=debian:${DEBIAN}-slim

FROM rust:1.95.0-${DEBIAN} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# By itself, so that it is made again only where the versions change: 5 GB.
COPY requirements.txt ./
COPY scripts/setup.sh scripts/
RUN ./scripts/setup.sh
COPY . .
# Without .git nothing else knows it.
ARG SAIL_COMMIT=
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    ./scripts/package.sh --out /package \
 && mkdir /opt/sail \
 && tar --strip-components=1 -C /opt/sail -xzf /package/sail-*.tar.gz

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
# For NCCL on InfiniBand and RoCE; what talks to GPUs is handed in by the container's engine.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /opt/
RUN python3 -m venv /opt/torch \
 && /opt/torch/bin/pip install --no-cache-dir --no-deps -r /opt/requirements.txt
COPY --from=build /opt/sail /opt/sail
ENV PATH=/opt/sail/bin:/opt/torch/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Configurations name the corpus as seen from here; a run's folder goes where `run.root` says.
RUN useradd --create-home --uid 10001 sail \
 && install --directory --owner=sail --group=sail /workspace \
 && ln -s /opt/sail/configs /opt/sail/data /workspace/
USER 10001:10001
WORKDIR /workspace
CMD ["sail-train", "--help"]
