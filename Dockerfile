# One file, two images (k8s/ names them), each for CPU or CUDA:
#   docker build -t modelglue-service:0.1.0-cpu .
#   docker build -t modelglue-builder:0.1.0-cpu --build-arg EXTRAS=builder .
#   docker build -t modelglue-service:0.1.0-cuda --build-arg TORCH_INDEX= .
# PyPI's torch brings CUDA's libraries along, so the host adds only its driver and no CUDA base is needed.
# A BASE that has this torch already (pytorch/pytorch:2.13.0-...) keeps its own.
ARG PYTHON=python:3.11.14
ARG BASE=${PYTHON}-slim-bookworm

# Not slim: it has the compiler for the kernels.
FROM ${PYTHON}-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY routers routers
COPY composed composed
COPY builder builder
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
# Numeric, for runAsNonRoot cannot judge a name. With a passwd entry, for getpass.getuser() in torch raises without one.
RUN groupadd --gid 10001 modelglue \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --create-home --shell /usr/sbin/nologin modelglue

# torch first, in a layer of its own: gigabytes that no change of ours makes a node pull again.
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip PIP_INDEX_URL="${TORCH_INDEX}" pip install "torch==${TORCH}"

ARG EXTRAS=service
# By path, not by name and version as DL3013 wants: an index could offer another "modelglue".
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    set -- /wheels/modelglue-*.whl && pip install "$1[${EXTRAS}]" "torch==${TORCH}"

# PASSIVE: compute threads that spin while they wait starve the event loop.
ENV HF_HOME=/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    MODELGLUE_CACHE=/cache \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
WORKDIR /cache
EXPOSE 8000
# http.client, not urllib: urllib would ask the proxy of the environment for 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=3); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]

# Bundles are never in the image: mount them read-only at /bundles.
ENTRYPOINT ["service"]
CMD ["--bundle", "/bundles/demo", "--host", "0.0.0.0", "--port", "8000"]
