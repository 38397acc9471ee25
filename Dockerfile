# One image for every role. Targets: `cpu` (default of the compose file) and `cuda` (its profile gpu).
#   docker build --target cpu -t ringasync:cpu .
# TORCH_FLAGS: more pip flags for torch alone, e.g. to name an index of CPU builds: without one, pip on
# Linux fetches a CUDA build, which makes the CPU image several gigabytes larger.

FROM docker.io/library/python:3.11-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# A compiler, for what has no wheel (pycosat); it stays in this stage.
FROM base AS build
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* && python -m venv /opt/venv
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies and source are layers of their own: another source builds and moves only the small one.
FROM build AS source
COPY pyproject.toml README.md ./
COPY ringasync ringasync
COPY workers workers
COPY learner learner
RUN pip install --no-deps --prefix=/opt/source .

FROM base AS wanted
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
[open(f"/{x}.txt", "w").write("\n".join(p["dependencies"] + p["optional-dependencies"][x])) for x in ("cpu", "vllm")]'

FROM build AS build-cpu
ARG TORCH_FLAGS=""
COPY constraints.txt ./
RUN pip install --no-compile $TORCH_FLAGS -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY --from=wanted /cpu.txt wanted.txt
RUN pip install --no-compile -c constraints.txt -r wanted.txt
# What no run uses: tests, C headers, symbols of the linker, pip. Bytecode is kept of what a run imports alone:
# of everything it is 360 MB, and without any each start of a role compiles for 7 s.
RUN cd /opt/venv/lib/python3.11/site-packages \
 && find . -type d \( -name tests -o -name test -o -name include \) -prune -exec rm -rf {} + \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && strip --strip-unneeded torch/lib/*.so && pip uninstall -q -y pip
RUN PYTHONDONTWRITEBYTECODE= python -c 'import accelerate, datasets, hiredis, jinja2, math_verify, msgpack, \
plotly.graph_objects, prometheus_client, psutil, pydantic, reasoning_gym, redis.asyncio, rich.live, safetensors.torch, \
starlette.applications, structlog, tomli_w, torch.utils.tensorboard, transformers.models.auto.modeling_auto, \
transformers.models.qwen3.modeling_qwen3, typer, uvicorn, uvloop, xxhash'

# vLLM brings the torch and the CUDA libraries it was built with.
FROM build AS build-cuda
COPY constraints-cuda.txt ./
COPY --from=wanted /vllm.txt wanted.txt
RUN pip install -c constraints-cuda.txt -r wanted.txt

# bubblewrap: the sandbox of verifiers (docs/sandbox.md). /app/runs belongs to the user, so that a new volume mounted there does too.
FROM base AS runtime
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends bubblewrap \
 && apt-get clean && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home ringasync && install -d -o 1000 -g 1000 /app/runs
WORKDIR /app
COPY configs configs
USER 1000:1000
ENTRYPOINT ["ringasync"]
CMD ["--help"]

# Triton compiles small C programs when it runs.
FROM runtime AS cuda
USER root
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
USER 1000:1000
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=source /opt/source /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=source /opt/source /opt/venv
