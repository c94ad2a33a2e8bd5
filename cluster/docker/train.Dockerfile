# Training, searching, evaluating: ftray with everything it needs on NVIDIA GPUs.
#
#   docker build -f cluster/docker/train.Dockerfile -t ghcr.io/your-team/ftray-train:0.1.0 .
#   docker build -f cluster/docker/train.Dockerfile --build-arg EXTRAS=s3,mlflow -t … .
#
# Python's packages are those of train.lock, at its versions. Base images are pinned by tag. To pin them by digest as well, look it up once and write it behind the tag:
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-devel-ubuntu24.04 --format '{{.Manifest.Digest}}'
#   ARG CUDA_TAG=13.0.2-devel-ubuntu24.04@sha256:…

ARG CUDA_TAG=13.0.2-devel-ubuntu24.04
ARG UV_VERSION=0.9.7

FROM ghcr.io/astral-sh/uv:${UV_VERSION} AS uv

FROM nvidia/cuda:${CUDA_TAG} AS build
# The interpreter of both images and of the tests; every machine of a Ray cluster must have the same minor version.
ARG PYTHON_VERSION=3.11
ARG EXTRAS=evaluate,s3,gcs,mlflow,wandb
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libaio-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_NO_CACHE=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN uv venv --python "${PYTHON_VERSION}" "${VIRTUAL_ENV}"
WORKDIR /src
# What changes rarely first: the dependencies that pyproject.toml names, at the versions of the lock. A package that the
# lock does not name, as by an extra that it was not made for, ends the build.
COPY pyproject.toml cluster/docker/requirements.py cluster/docker/train.lock ./
RUN python requirements.py --extras "${EXTRAS}" > requirements.txt \
 && uv pip install --requirements requirements.txt --constraints train.lock \
 && ! uv pip freeze | grep --invert-match --line-regexp --fixed-strings --file train.lock
# DeepSpeed compiles against the toolkit of the base: a torch for another CUDA is said here, not on the first node.
RUN python -c "import torch; v = torch.version.cuda or 'none'; assert v.split('.')[0] == '${CUDA_VERSION}'.split('.')[0], \
    f'torch is built for CUDA {v}, the base has ${CUDA_VERSION}: choose another CUDA_TAG'"
COPY README.md LICENSE ./
COPY ftray ftray
COPY serve serve
RUN uv pip install --no-deps . ninja

# DeepSpeed's CPU Adam and file access, compiled where ftray looks for them. The compiler's own wrapper keeps the result
# usable on other processors of the same vector width; on another width torch compiles it again, once a container.
COPY --chmod=0755 cluster/docker/g++ /opt/ftray/bin/g++
ENV CXX=/opt/ftray/bin/g++ TORCH_EXTENSIONS_DIR=/opt/ftray/extensions DS_ACCELERATOR=cuda
RUN python -c "from ftray.train.native import compile_parts; compile_parts(['cpu_adam', 'async_io'])"

FROM nvidia/cuda:${CUDA_TAG} AS train
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget: KubeRay's probes; rsync, ssh: `ray up`; pgrep: what the pods wait for before they end; g++: the wrapper above, and ftray's own product of adapters on CPUs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libaio-dev wget rsync openssh-client ca-certificates procps tini \
 && rm -rf /var/lib/apt/lists/* \
 && (userdel --remove ubuntu || true) \
 && useradd --uid 1000 --create-home --shell /bin/bash ftray
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=1000:1000 /opt/ftray /opt/ftray
COPY --chmod=0755 cluster/docker/stop_jobs.py /opt/ftray/bin/stop-jobs
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/opt/ftray/bin:$PATH \
    CXX=/opt/ftray/bin/g++ TORCH_EXTENSIONS_DIR=/opt/ftray/extensions \
    RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/ftray
# No HEALTHCHECK: the image runs as a node of Ray, whose health KubeRay and Ray's head ask for, or as one command.
ENTRYPOINT ["/usr/bin/tini", "-g", "--"]
CMD ["ftray", "--help"]
