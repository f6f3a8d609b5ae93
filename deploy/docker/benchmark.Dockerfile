# `make first-hour` in a container, on a machine with an NVIDIA GPU: the image of cuda.Dockerfile with benchmarks/.
#
#   docker build -f deploy/docker/cuda.Dockerfile -t reinforce:cuda .
#   docker build -f deploy/docker/benchmark.Dockerfile -t reinforce:benchmark .
#   docker run --gpus all --shm-size=8g --name first-hour reinforce:benchmark
#   docker cp first-hour:/first-hour/first-hour.tar.gz .
#
# With real weights: docker run -v "$PWD/my-models:/weights:ro" ... reinforce:benchmark --weights /weights

ARG BASE=reinforce:cuda

# hadolint ignore=DL3006
FROM ${BASE}
USER 0
RUN install --directory --owner=1000 /first-hour
USER 1000
COPY benchmarks /opt/reinforce/benchmarks
COPY docs/performance.md /opt/reinforce/docs/performance.md
WORKDIR /opt/reinforce
# Without gcc and the headers of Python nothing is compiled: the build fails then.
RUN python -m benchmarks.gpu.machine --only compiler
ENTRYPOINT ["python", "-m", "benchmarks.gpu", "--first-hour", "--folder", "/first-hour"]
