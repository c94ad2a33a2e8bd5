# Serving: the endpoint and the registry's commands, without DeepSpeed and what else only training and searching take.
#
#   docker build -f cluster/docker/serve.Dockerfile -t ghcr.io/your-team/ftray-serve:0.1.0 .
#   docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:8000:8000 -v "$PWD":/work -w /work \
#     ghcr.io/your-team/ftray-serve:0.1.0 serve serve.yaml http_options.host=0.0.0.0     # needs args.tenants: keys
#
# Python's packages are those of serve.lock, at its versions. Base images are pinned by tag. To pin them by digest as well, look it up once and write it behind the tag:
#   docker buildx imagetools inspect python:3.11-slim-bookworm --format '{{.Manifest.Digest}}'
#   ARG PYTHON_TAG=3.11-slim-bookworm@sha256:…

ARG PYTHON_TAG=3.11-slim-bookworm
ARG UV_VERSION=0.9.7

FROM ghcr.io/astral-sh/uv:${UV_VERSION} AS uv

FROM python:${PYTHON_TAG} AS build
ARG EXTRAS=s3,gcs
# For a machine without GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=https://pypi.org/simple
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN uv venv --python /usr/local/bin/python "${VIRTUAL_ENV}"
WORKDIR /src
COPY pyproject.toml cluster/docker/requirements.py cluster/docker/serve.lock ./
# torch alone from its index, all else at the versions of the lock. A package that the lock does not name, as by an extra
# that it was not made for, ends the build; torch's own index calls its version 2.13.0+cpu.
RUN python requirements.py --serve --extras "${EXTRAS}" > requirements.txt \
 && grep '^torch==' requirements.txt > torch.txt \
 && uv pip install --no-deps --default-index "${TORCH_INDEX}" --requirements torch.txt \
 && uv pip install --requirements requirements.txt --constraints serve.lock \
 && ! uv pip freeze | sed 's/+.*//' | grep --invert-match --line-regexp --fixed-strings --file serve.lock
COPY README.md LICENSE ./
COPY ftray ftray
COPY serve serve
# --no-deps: pyproject.toml names what training needs too; requirements.py has left that out.
RUN uv pip install --no-deps . && python -c "import serve.app"

FROM python:${PYTHON_TAG} AS serve
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget: KubeRay's probes; gcc: ftray compiles its product of adapters for CPUs with it, half a second at the start.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 wget tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --shell /bin/bash ftray
COPY --from=build /opt/venv /opt/venv
COPY --chmod=0755 cluster/docker/stop_jobs.py /opt/ftray/bin/stop-jobs
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/opt/ftray/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/ftray
EXPOSE 8000
# Of the endpoint when this container is one by itself; Kubernetes does not look at it. A base takes time to load.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=4 \
    CMD ["wget", "--tries=1", "--timeout=4", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/readyz"]
ENTRYPOINT ["/usr/bin/tini", "-g", "--", "ftray"]
CMD ["--help"]
