# The autoscaler: a router's packages and the Kubernetes client. Neither torch nor Ray. Build as router.Dockerfile.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS dependencies
ARG EXTRAS="router autoscaler"
ARG CONSTRAINTS=deploy/docker/constraints.txt
# Compiled Python files then hold a digest of their source in place of a time.
ARG SOURCE_DATE_EPOCH=0
ENV PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
COPY pyproject.toml deploy/docker/requirements.py ${CONSTRAINTS} ./
RUN python3 -m venv /opt/venv
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 requirements.py pyproject.toml ${EXTRAS} > wanted.txt \
    && PIP_CONSTRAINT=/build/$(basename ${CONSTRAINTS}) \
       /opt/venv/bin/python -m pip install --no-cache-dir -r wanted.txt

FROM ${BASE} AS wheel
ARG SOURCE_DATE_EPOCH=0
ENV PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN python3 -m venv /opt/tools
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_CONSTRAINT=/build/deploy/docker/constraints.txt \
    /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG SOURCE_DATE_EPOCH=0
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="switchyard/autoscaler" \
      org.opencontainers.image.description="Autoscaler of a Switchyard cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 switchyard \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/switchyard --shell /usr/sbin/nologin switchyard
COPY --from=dependencies /opt/venv /opt/venv
COPY models /opt/switchyard/models
# The demo model is looked for beside the installed packages.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && ln -s /opt/switchyard/models "$(/opt/venv/bin/python -c 'import deploy.config; print(deploy.config.ROOT)')/models" \
    && /opt/venv/bin/python -m pip uninstall --yes setuptools pip
# Files of the image are read-only in a pod: nothing is compiled there at run time.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/switchyard \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /home/switchyard
USER 10001:10001
ENTRYPOINT ["switchyard"]
CMD ["--help"]
