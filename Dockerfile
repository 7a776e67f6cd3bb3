# vLLM's own server image with the EchoKV plugin added. The image has everything we require, so
# --no-deps keeps its vLLM, torch and CUDA exactly as published.
FROM vllm/vllm-openai:v0.32.0

COPY setup.py pyproject.toml README.md LICENSE /opt/echokv/
COPY echokv_vllm /opt/echokv/echokv_vllm
COPY kernels /opt/echokv/kernels
RUN python3 -m pip install --no-cache-dir --no-deps /opt/echokv

# The base image's entry point is the vLLM server:
#   docker run --gpus all IMAGE MODEL --attention-backend echokv \
#     --additional-config '{"echokv": {"checkpoint": "DIR"}}'
