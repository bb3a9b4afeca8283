# docker build -t sophia-gpt2 .
# docker run -v "$PWD/tokens:/tokens" sophia-gpt2 \
#     python data/openwebtext/prepare.py --out /tokens/openwebtext
# docker run --gpus all --ipc=host -v "$PWD/tokens:/tokens" -v "$PWD/out:/app/out" sophia-gpt2 \
#     torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g \
#     --data.path=/tokens/openwebtext
#
# The mounted folders must be writable for user 1000. CUDA 13.0 is what the wheel of torch 2.13.0
# is built for; the host needs a driver of version 580 or newer.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# torch.compile calls a C compiler, on GPUs too, and includes Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv python3-dev gcc g++ git \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu 24.04 has the user ubuntu with this number.
WORKDIR /app
RUN chown ubuntu:ubuntu /app
USER 1000

ENV PATH=/app/.venv/bin:$PATH
COPY --chown=ubuntu:ubuntu requirements.txt ./
RUN python3 -m venv .venv && pip install --no-cache-dir -r requirements.txt
COPY --chown=ubuntu:ubuntu . .

CMD ["python", "train.py", "--help"]
