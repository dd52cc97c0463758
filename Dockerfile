# syntax=docker/dockerfile:1

# By tag, so that it can be read. To pin what the tag led to on one day, give the digest too:
#     docker build --build-arg BASE=python:3.13.14-slim-trixie@sha256:… .
ARG BASE=python:3.13.14-slim-trixie

FROM ${BASE} AS build

WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1

# What is installed is what the lock files name, hash by hash, and wheels only: nothing of
# somebody else's is built or run here. Neither environment holds pip itself.
#
# Who reaches a package index through a mirror or a proxy gives its pip.conf and the certificate
# to trust as secrets; they are there for the length of a RUN and in no layer:
#     docker build --secret id=pip.conf,src=… --secret id=ca.pem,src=… .
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    python -m venv --without-pip /opt/sidecar \
    && python -m venv /opt/build \
    && /opt/build/bin/pip --python /opt/sidecar/bin/python install --no-compile \
        --require-hashes --only-binary :all: -r requirements/runtime.txt \
    && /opt/build/bin/pip install \
        --require-hashes --only-binary :all: -r requirements/build.txt

# The modules are compiled here, as nothing can be written later. Unchecked: what is copied may
# get another time of modification, and a module is not to be compiled again at every start.
# Other packages' programs go, and zstandard's second back end (12 MB), which CPython never loads.
COPY pyproject.toml README.md LICENSE ./
COPY sidecar sidecar
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist . \
    && /opt/build/bin/pip --python /opt/sidecar/bin/python install --no-compile \
        --no-deps --no-index --find-links dist litellm-cache-sidecar \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/sidecar/lib \
    && find /opt/sidecar/bin -mindepth 1 ! -name sidecar ! -name 'python*' -delete \
    && find /opt/sidecar/lib -path '*/zstandard/_cffi.*' -delete


FROM ${BASE}

ARG BASE
ARG VERSION=0.1.0
# What was built, and when (RFC 3339): `git rev-parse HEAD` and the time.
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="litellm-cache-sidecar" \
      org.opencontainers.image.description="A reverse-proxy sidecar for LiteLLM that counts the provider's prompt cache" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="docker.io/library/${BASE}"

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
