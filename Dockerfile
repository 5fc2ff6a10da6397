# gpulayers with CuPy from wheels: no CUDA toolkit image, only the host's NVIDIA driver is needed.
#
#   docker build -t gpulayers:cuda12 .                             # or --build-arg CUDA=cuda13 -t gpulayers:cuda13
#   docker run --rm --gpus all gpulayers:cuda12                    # the main job; without --gpus it runs on NumPy
#   docker run --rm --gpus all -v gpulayers-kernels:/home/gpulayers/.cupy gpulayers:cuda12 python -m gpulayers.report
#   docker build --target test -t gpulayers:test . && docker run --rm --gpus all gpulayers:test
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY gpulayers gpulayers
COPY kernels kernels
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ARG CUDA=cuda12
# Images that do not descend from NVIDIA's say themselves what the container runtime should give them.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
# CuPy keeps compiled kernels, readable by their owner alone, under the home folder: hence a user with a real home.
RUN groupadd --gid 1000 gpulayers \
    && useradd --uid 1000 --gid gpulayers --create-home --shell /bin/bash gpulayers \
    && install --directory --owner=gpulayers --group=gpulayers --mode=0700 /home/gpulayers/.cupy
COPY --from=wheel /wheels /wheels
RUN wheel="$(echo /wheels/gpulayers-*.whl)" \
    && python -m pip install --no-cache-dir "gpulayers[${CUDA},bfloat16,safetensors,plot,progress] @ file://${wheel}"
COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/gpulayers-entrypoint

FROM base AS test
# A C++ compiler builds the kernels for the CPU; the tests run them that way where there is no GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN wheel="$(echo /wheels/gpulayers-*.whl)" \
    && python -m pip install --no-cache-dir "gpulayers[test] @ file://${wheel}"
COPY --chown=gpulayers:gpulayers . /home/gpulayers/checkout
USER 1000:1000
WORKDIR /home/gpulayers/checkout
VOLUME /home/gpulayers/.cupy
ENTRYPOINT ["gpulayers-entrypoint"]
CMD ["python", "-m", "pytest"]

FROM base AS runtime
USER 1000:1000
WORKDIR /home/gpulayers
VOLUME /home/gpulayers/.cupy
ENTRYPOINT ["gpulayers-entrypoint"]
CMD []
