# llmprobe added to an image that has vLLM. Build: docker build --build-arg BASE=<your vLLM image> -t vllm-llmprobe .
# Run it with room for journals: --shm-size=1g (vLLM wants that too), or --ipc=host.
ARG BASE=vllm/vllm-openai:latest
FROM ${BASE}

COPY pyproject.toml README.md LICENSE /opt/llmprobe/
COPY src /opt/llmprobe/src
RUN python3 -m pip install --no-cache-dir /opt/llmprobe && llmprobe --version

ENV LLMPROBE=1
