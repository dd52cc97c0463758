# syntax=docker/dockerfile:1
FROM python:3.13.14-slim-trixie AS build

WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1

# What is installed is what the lock files name, hash by hash, and wheels only: nothing of
# somebody else's is built or run here. Neither environment holds pip itself.
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN python -m venv --without-pip /opt/sidecar \
    && pip --python /opt/sidecar/bin/python install \
        --require-hashes --only-binary :all: -r requirements/runtime.txt
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install \
        --require-hashes --only-binary :all: -r requirements/build.txt

COPY pyproject.toml README.md LICENSE ./
COPY sidecar sidecar
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist . \
    && pip --python /opt/sidecar/bin/python install --no-deps --no-index dist/*.whl


FROM python:3.13.14-slim-trixie

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="litellm-cache-sidecar" \
      org.opencontainers.image.description="A reverse-proxy sidecar for LiteLLM that counts the provider's prompt cache" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"

COPY --from=build /opt/sidecar /opt/sidecar

# A container is reached from outside, so it listens on all addresses. Nothing is written to
# disk, unless SIDECAR_USAGE_LOG names a file: a read-only root file system will do.
ENV PATH="/opt/sidecar/bin:${PATH}" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SIDECAR_HOST=0.0.0.0 \
    SIDECAR_ADMIN_HOST=0.0.0.0

# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
WORKDIR /

# 4001: clients. 4002: metrics and probes.
EXPOSE 4001 4002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s --retries=3 \
    CMD ["sidecar", "healthcheck"]

ENTRYPOINT ["sidecar"]
CMD ["serve"]
