"""Worker side: layers, pages, metadata and attention of the echokv backend.

Selecting the backend imports this package first, so that a vLLM without the hooks the modules
below are built on ends in an error that names them.
"""

from echokv_vllm import hooks

hooks.require_supported()
