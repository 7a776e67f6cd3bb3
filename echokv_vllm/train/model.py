"""Loads the base model of a training run and explains what it cannot use."""

from __future__ import annotations

from typing import Any

import torch


def load_config(model: str) -> Any:
    """Config of a model folder or repo id.

    Raises:
        ValueError: If there is no such model or its config cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model!r} has no readable config ({_one_line(error)}); give a Hugging Face "
            "model folder or repo id"
        ) from error


def load_tokenizer(model: str, parse_special: bool = False) -> Any:
    """Tokenizer of a model folder or repo id.

    Args:
        model: Folder or repo id.
        parse_special: It must read special tokens that are spelled out in a text, as calibration
            text in the chat format has them. Such a tokenizer may add none by itself.

    Raises:
        ValueError: If it has none, or needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return _parsing_special_tokens(tokenizer, model) if parse_special else tokenizer
    except ImportError as error:
        raise ValueError(_lacks_package("tokenizer", model, error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(_no_tokenizer(model, error)) from error
    except Exception as error:
        # The package tokenizers has no class of its own for files it cannot parse.
        if type(error) is not Exception:
            raise
        raise ValueError(_no_tokenizer(model, error)) from error


def _parsing_special_tokens(tokenizer: Any, model: str) -> Any:
    """The tokenizer, or one of the same vocabulary that reads special tokens in a text.

    Where mistral-common is installed, as vLLM wants it, and the model has a `tekken.json`,
    transformers hands out a tokenizer to which `[INST]` in a text is five plain tokens; keys and
    values of the chat format would never be seen.
    """
    if type(tokenizer).__name__ != "MistralCommonBackend":
        return tokenizer
    from transformers import TokenizersBackend

    parsing = TokenizersBackend.from_pretrained(model)
    # A conversion of tekken.json alone does not name them.
    for name in ("bos_token", "eos_token"):
        if getattr(parsing, name) is None:
            setattr(parsing, name, getattr(tokenizer, name))
    return parsing


def _no_tokenizer(model: str, error: BaseException) -> str:
    return (
        f"model {model!r} has no readable tokenizer ({_one_line(error)}); put the tokenizer files "
        "beside the weights, and install the tokenizers release they were written with"
    )


def load_model(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Causal LM in eval mode on `device`.

    Raises:
        ValueError: If the weights are missing, damaged or incomplete, or in a form that needs a
            package that is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        # A pair because of output_loading_info; the annotation of transformers leaves that out.
        result: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, output_loading_info=True
        )
    except ImportError as error:
        raise ValueError(_lacks_package("weights", model, error)) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # RuntimeError: tensors of the wrong shape.
        raise ValueError(
            f"the weights of model {model!r} cannot be read ({_one_line(error)}); fetch it again"
        ) from error
    loaded, info = result
    # transformers fills absent weights with random numbers and only warns.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model {model!r} lacks {len(missing)} weights, for example {missing[0]}; fetch it "
            "again"
        )
    return loaded.to(device).eval()


def resolve_device(name: str) -> torch.device:
    """Device of an option value.

    Raises:
        ValueError: If it is no CPU or CUDA device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use device=cpu or install a torch build for your GPU"
        )
    return device


def resolve_dtype(name: str, device: torch.device, hf_config: Any) -> torch.dtype:
    """Dtype of an option value: `auto` is float32 on the CPU and the model's own on CUDA."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        stored = getattr(hf_config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _lacks_package(part: str, model: str, error: ImportError) -> str:
    return (
        f"reading the {part} of model {model!r} needs a package that is not installed "
        f"({_one_line(error)}); install it, or use a copy of the model with plain safetensors "
        "weights and a tokenizer.json"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
