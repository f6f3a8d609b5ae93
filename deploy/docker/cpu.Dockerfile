# For heads and nodes without an accelerator: the dependencies in /opt/venv, code and configs in /opt/reinforce.
#
#   docker build -f deploy/docker/cpu.Dockerfile -t YOUR-REGISTRY/reinforce:cpu .

ARG BASE=python:3.11-slim-trixie

# hadolint ignore=DL3006
FROM ${BASE} AS build
# The versions that the tests ran with; constraints.txt holds those of everything else.
ARG TORCH=2.13.0
ARG TORCHVISION=0.28.0
# More packages: boto3 or google-api-python-client for heads of Ray's cluster launcher on AWS or GCP.
ARG PACKAGES=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/reinforce
# Without the dependencies of torch, since their versions are those of constraints.txt.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --index-url "${TORCH_INDEX}" \
    "torch==${TORCH}" "torchvision==${TORCHVISION}"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY schemas schemas
COPY teachers teachers
COPY reinforce reinforce
COPY configs configs
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --constraint constraints.txt '.[fast,server,train]' ${PACKAGES} \
    && rm -rf build ./*.egg-info

# hadolint ignore=DL3006
FROM ${BASE}
# Ray's cluster launcher copies files by rsync and ssh.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client rsync \
    && rm -rf /var/lib/apt/lists/*
# Login shells reset PATH, and some launchers start Ray in one.
RUN useradd --uid 1000 --create-home --shell /bin/bash ray \
    && echo "PATH=/opt/venv/bin:\$PATH" >/etc/profile.d/venv.sh
COPY --from=build /opt/venv /opt/venv
COPY jobs /opt/reinforce/jobs
COPY configs /opt/reinforce/configs
COPY deploy/drain_on_notice.py /opt/reinforce/
ENV PATH=/opt/venv/bin:$PATH HOME=/home/ray PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/ray
# No HEALTHCHECK: what is healthy differs between a head, a node and a command. deploy/kuberay has probes of Ray.
CMD ["reinforce", "--help"]
