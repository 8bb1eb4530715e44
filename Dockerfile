# syntax=docker/dockerfile:1
# Penstock for CPUs (`--target cpu`, the default) and for NVIDIA GPUs (`--target cuda`).
#
#   docker build -t REGISTRY/penstock:0.1.0-cpu .
#   docker build -t REGISTRY/penstock:0.1.0-cuda --target cuda .
#
# Images are named by tag and digest: give the digests of the day, so that a build can be repeated:
#   --build-arg PYTHON_IMAGE=docker.io/library/python:3.11.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11.11-slim-bookworm
ARG CUDA_IMAGE=docker.io/nvidia/cuda:12.8.1-runtime-ubuntu24.04
# What fsspec wants for a model or documents behind s3:// or gs://: --build-arg ADD_PACKAGES="s3fs gcsfs".
ARG ADD_PACKAGES=""
ARG CUDA_TORCH_INDEX=https://download.pytorch.org/whl/cu128

# A virtual environment with exact versions. torch comes first and from its own index: a range would take another build.
FROM ${PYTHON_IMAGE} AS build-cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH
COPY constraints.txt pyproject.toml README.md LICENSE ./
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${CPU_TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY . .
ARG ADD_PACKAGES
RUN pip install -c constraints.txt ".[otel]" ${ADD_PACKAGES}

FROM ${PYTHON_IMAGE} AS cpu
# gcc: the CPU's kernels are compiled for the processor at hand at their first use. bash: what KubeRay runs.
RUN apt-get update && apt-get install -y --no-install-recommends bash gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /tmp --no-create-home penstock \
    && install -d -o penstock -g penstock /certs
COPY --from=build-cpu /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
ENTRYPOINT []
CMD ["penstock", "serve", "ledger"]

FROM ${CUDA_IMAGE} AS build-cuda
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH
COPY constraints.txt pyproject.toml README.md LICENSE ./
ARG CUDA_TORCH_INDEX
RUN pip install --index-url "${CUDA_TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY . .
ARG ADD_PACKAGES
# triton's version is torch's business here; every other one is exact.
RUN grep -v '^triton==' constraints.txt > /tmp/constraints.txt && pip install -c /tmp/constraints.txt ".[otel]" ${ADD_PACKAGES}

FROM ${CUDA_IMAGE} AS cuda
ENV DEBIAN_FRONTEND=noninteractive
# gcc and python3-dev: Triton builds its launcher at the first use of a kernel.
RUN apt-get update && apt-get install -y --no-install-recommends bash gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /tmp --no-create-home penstock \
    && install -d -o penstock -g penstock /certs
COPY --from=build-cuda /opt/penstock /opt/penstock
ENV PATH=/opt/penstock/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 HOME=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
ENTRYPOINT []
CMD ["penstock", "serve", "ledger", "--device", "cuda"]

# The last stage is what `docker build .` makes.
FROM cpu
