"""EchoKV for vLLM: KV-cache compression that is lossless until memory is short.

Importing this package imports neither torch nor vLLM; vLLM loads every plugin in every
process, also where EchoKV is not used.
"""

__version__ = "0.1.0"
