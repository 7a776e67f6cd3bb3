"""Entry point ``vllm.general_plugins``: runs in every vLLM process, often more than once."""

from __future__ import annotations

from echokv_vllm import compat, hooks
from echokv_vllm.metrics import announce_folder


def register() -> None:
    """Makes the echokv attention backend selectable. May be called again.

    On a vLLM without the hooks EchoKV needs only the name is registered, where that is possible:
    selecting it then ends in an error that names what is missing
    (:func:`hooks.require_supported`), and every other use of vLLM goes on undisturbed.
    """
    announce_folder()
    missing = hooks.missing_hooks()
    if missing:
        hooks.logger.warning(
            "EchoKV does not work with vLLM %s, which lacks %s; --attention-backend echokv is not "
            "available.", hooks.vllm_version(), ", ".join(missing),
        )  # fmt: skip
        if set(missing) & set(hooks.NAME_HOOKS):
            return
    if not compat.register_backend_name():
        return
    compat.patch_cpu_platform()
    if not missing:
        compat.patch_scheduler()
        compat.patch_lookup()
        compat.patch_allocation()
        if not hooks.missing_hooks(hooks.STEP_HOOKS):
            compat.patch_schedule()
        compat.patch_input_processor()
