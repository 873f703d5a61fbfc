# Head and workers of the Ray cluster: Ray, torch, and everything of the router. Also fetches models.
# CPU: see README.md.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS dependencies
ARG EXTRAS=cluster
ARG CONSTRAINTS=deploy/docker/constraints.txt
# torch's CUDA builds each want one Triton. The kernels were tuned with this pair; pyproject.toml has the range.
ARG TORCH=2.11.0
ARG TRITON=3.6.0
# Compiled Python files then hold a digest of their source in place of a time.
ARG SOURCE_DATE_EPOCH=0
ENV PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml deploy/docker/requirements.py ${CONSTRAINTS} ./
RUN python3 -m venv /opt/venv
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 requirements.py pyproject.toml ${EXTRAS} > wanted.txt \
    && PIP_CONSTRAINT=/build/$(basename ${CONSTRAINTS}) \
       /opt/venv/bin/python -m pip install --no-cache-dir -r wanted.txt torch==${TORCH} triton==${TRITON}

FROM dependencies AS wheel
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/tools
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_CONSTRAINT=/source/deploy/docker/constraints.txt \
    /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG SOURCE_DATE_EPOCH=0
ARG VERSION=0.1.0
ARG REVISION=unknown
# Triton compiles a small C program around each kernel when it first runs: on GPUs a compiler stays.
ARG KERNEL_TOOLS="gcc libc6-dev python3-dev"
LABEL org.opencontainers.image.title="switchyard/ray" \
      org.opencontainers.image.description="Ray head and workers of a Switchyard cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# wget: the probes of KubeRay and of the chart.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
       python3 ca-certificates wget bash ${KERNEL_TOOLS} \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 switchyard \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/switchyard --shell /bin/bash switchyard
COPY --from=dependencies /opt/venv /opt/venv
COPY models /opt/switchyard/models
# The demo model is looked for beside the installed packages.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && ln -s /opt/switchyard/models "$(/opt/venv/bin/python -c 'import deploy.config; print(deploy.config.ROOT)')/models" \
    && /opt/venv/bin/python -m pip uninstall --yes pip
# A login shell, which Ray's autoscaler may be started in, sets PATH anew.
RUN echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/switchyard.sh
# Files of the image are read-only in a pod: nothing is compiled there at run time.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/switchyard \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# GPUs only for pods that ask for them: the device plugin says which. The CUDA base would show all of a node's to the head.
ENV NVIDIA_VISIBLE_DEVICES=void \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/switchyard
USER 10001:10001
ENTRYPOINT ["switchyard"]
CMD ["--help"]
