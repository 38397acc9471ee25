# One image for every role. Targets: `cpu` (default of the compose file) and `cuda` (its profile gpu).
#   docker build --target cpu -t ringasync:cpu .
# TORCH_FLAGS: more pip flags for torch alone, e.g. to name an index of CPU builds: without one, pip on
# Linux fetches a CUDA build, which makes the CPU image several gigabytes larger.

FROM docker.io/library/python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# A compiler, for what has no wheel (pycosat); it stays in this stage.
FROM base AS build
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* && python -m venv /opt/venv
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1

FROM build AS build-cpu
ARG TORCH_FLAGS=""
COPY constraints.txt ./
RUN pip install $TORCH_FLAGS -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md ./
COPY ringasync ringasync
COPY workers workers
COPY learner learner
RUN pip install -c constraints.txt ".[cpu]"

# vLLM brings the torch and the CUDA libraries it was built with.
FROM build AS build-cuda
COPY pyproject.toml README.md ./
COPY ringasync ringasync
COPY workers workers
COPY learner learner
RUN pip install ".[vllm]"

# /app/runs belongs to the user, so that a new volume mounted there does too.
FROM base AS runtime
RUN useradd --uid 1000 --create-home ringasync && install -d -o 1000 -g 1000 /app/runs
WORKDIR /app
COPY configs configs
USER 1000:1000
ENTRYPOINT ["ringasync"]
CMD ["--help"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
