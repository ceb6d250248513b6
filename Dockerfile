# CPU:   docker build -t llm-pg .
# CUDA:  docker build -t llm-pg --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:   docker run --rm -v "$PWD/runs:/work/runs" llm-pg quickstart
#        docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v "$HOME/.cache/huggingface:/hub" llm-pg train run.yaml
# Rewards that execute programs need Landlock and seccomp from the host's kernel; SECURITY.md says what holds without them.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A compiler for torch.compile and flex_attention, and nothing else.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY llm_pg llm_pg
COPY reward_fns reward_fns
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt ".[math,schema,judge,report]"
ENV HF_HOME=/hub PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 user && mkdir -p /hub /work/runs && chown -R user /hub /work
USER user
WORKDIR /work
ENTRYPOINT ["llm-pg"]
CMD ["--help"]
