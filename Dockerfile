# `hermes-async serve` in a container. To build it without CUDA, give the index of PyTorch's CPU builds:
#
#     docker build --build-arg TORCH_INDEX_URL=<PyTorch's CPU index> --tag hermes-async .
#
# To serve a model of the hub to this machine alone (without a key or --no-auth the server refuses to start):
#
#     docker run --memory 6g --publish 127.0.0.1:8000:8000 --volume hermes-cache:/cache \
#         --env HERMES_ASYNC_API_KEY hermes-async ORG/NAME
#
# A folder with checkpoints can be mounted at /models: `--volume /srv/models:/models:ro ... hermes-async /models/NAME`.
# The budget `auto` follows the container's limit on memory.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX_URL=""
WORKDIR /build
RUN python -m venv /opt/hermes-async
ENV PATH=/opt/hermes-async/bin:$PATH
# torch first: its layer stays as it is when the package changes.
COPY constraints-dev.txt ./
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' constraints-dev.txt)"; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY hermes_async hermes_async
RUN pip install --no-cache-dir --constraint constraints-dev.txt ".[serve,structured,vision]"

FROM python:${PYTHON_VERSION}-slim
RUN useradd --uid 1000 --create-home hermes \
    && install --directory --owner hermes --group hermes /cache /models
COPY --from=build /opt/hermes-async /opt/hermes-async
# Downloads and profiles lie in /cache. The page and the API listen on all of the container's addresses.
ENV PATH=/opt/hermes-async/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HERMES_ASYNC_HOST=0.0.0.0 \
    HERMES_ASYNC_PORT=8000
VOLUME ["/cache", "/models"]
EXPOSE 8000
USER 1000
WORKDIR /home/hermes
# /health answers as soon as the server listens; a first start downloads the model before that. Where HERMES_ASYNC_ALLOWED_HOST
# is set, it must name 127.0.0.1 too.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m \
    CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['HERMES_ASYNC_PORT']), timeout=5); server.request('GET', '/health'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["hermes-async", "serve"]
