# The GPU pins (requirements/gpu.txt) and this checkout.
# CUDA 13 with its compiler: DeepSpeed, FlashInfer and Triton build kernels at run time.
#   docker build -t pgenrm-train:0.1.0 .
#   mkdir -p runs && sudo chown 10001 runs   # the container's user must own the mounted folder
#   docker run --gpus all --shm-size=32g -v "$PWD/runs:/runs" pgenrm-train:0.1.0 recipe=gpu_check model=nano_1b cluster=gpu1 run_dir=/runs/gpu-check
# Keys are given to the container when it starts (-e NAME), never to the build.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# The archive keeps one version per package: a pinned version would break the build at the next update.
# RDMA libraries: without them NCCL falls back to TCP between nodes.  veRL opens libnuma.so (libnuma-dev).
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git ibverbs-providers libibverbs1 libnuma-dev librdmacm1t64 openssh-client python3.12 python3.12-dev python3.12-venv wget \
    && rm -rf /var/lib/apt/lists/*

# KubeRay starts its commands in a login shell, which resets PATH; $PATH is for that shell.
# hadolint ignore=SC2016
RUN useradd --create-home --uid 10001 trainer \
    && mkdir -p /opt/venv /opt/pgenrm-train /runs \
    && chown trainer:trainer /opt/venv /opt/pgenrm-train /runs \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh
USER 10001

# Weights outlive the container on the mounted volume.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/runs/huggingface \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# The pins first: this layer, most of the image, stays the same when the code changes.
COPY --chown=trainer:trainer requirements/gpu.txt /opt/pgenrm-train/requirements/gpu.txt
RUN python3.12 -m venv /opt/venv \
    && pip install --requirement /opt/pgenrm-train/requirements/gpu.txt

WORKDIR /opt/pgenrm-train
COPY --chown=trainer:trainer . .
RUN pip install --no-deps --no-build-isolation --editable .

ENTRYPOINT ["python", "-m", "pgenrm_train"]
CMD ["--help"]
