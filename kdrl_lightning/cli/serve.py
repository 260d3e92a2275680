"""Runs ``python -m kdrl_lightning serve``: a vLLM server with the flags that rollouts need."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import json
import os
import secrets
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from kdrl_lightning.cli.plain_parser import PlainParser
from kdrl_lightning.engines.vllm.options import flags_of
from kdrl_lightning.engines.vllm.worker import NAME
from kdrl_lightning.errors import ConfigurationError

WARNING = """\
warning: anyone who can reach {host}:{port} can replace the weights, pause the server and call any
method of its workers: vLLM's key guards only /v1. Expose it only to a private network."""


def serve(args: Sequence[str]) -> NoReturn:
    """Replace this process by vLLM's server.

    Args:
        args: the command line after ``serve``.

    Raises:
        ConfigurationError: a flag is wrong, or vLLM is not installed.
    """
    settings = parse(args)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "vLLM must be installed to serve: got no installation of it. Install it: pip install "
            "'kdrl_lightning[vllm]'."
        )
    if not is_loopback(settings.host) and not settings.teacher:
        print(WARNING.format(host=settings.host, port=settings.port), file=sys.stderr)
    key = os.environ.get("VLLM_API_KEY")
    if not key:
        key = secrets.token_urlsafe(24)
        print(f"VLLM_API_KEY={key}  # give it to the trainer's environment", flush=True)
    needed = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"}
    if not settings.teacher:
        needed["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that take weights
    os.execve(sys.executable, [sys.executable, *command(settings)], {**os.environ, **needed})


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags.

    Raises:
        ConfigurationError: a flag is missing or unknown, or the host is not a loopback address and
            ``--expose`` is missing.
    """
    parser = PlainParser(
        "python -m kdrl_lightning serve",
        description="Start a vLLM server that samples for VLLMServerEngine or scores for a "
        "ServerTeacher. It takes its key from VLLM_API_KEY, or makes one and prints it. Flags "
        "after -- go to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument(
        "--teacher", action="store_true", help="serve a teacher, whose weights never change"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to bind (default: 127.0.0.1); one that other machines reach needs --expose",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to bind (default: 8000)")
    parser.add_argument(
        "--expose", action="store_true", help="allow an address that other machines reach"
    )
    parser.add_argument(
        "--transfer", help="nccl: get weights from the trainer's GPU instead of files"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="type of the weights: auto (the default), bfloat16, ...",
    )
    parser.add_argument(
        "--max-model-len", type=int, help="longest prompt and completion together, in tokens"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        help="part of the GPU's memory that the server may take (default: 0.9)",
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        help="size of the KV cache in bytes; must be given on a CPU",
    )
    parser.add_argument("vllm", nargs="*", help="more flags of vLLM, after --")
    settings = parser.parse_args(list(args))
    if not is_loopback(settings.host) and not settings.expose:
        raise ConfigurationError(
            f"`--host` must be a loopback address without `--expose`: got {settings.host}. vLLM's "
            "key does not guard the routes that change weights: expose it to a private network "
            "only."
        )
    return settings


def command(settings: argparse.Namespace) -> list[str]:
    """Return the arguments with which Python runs vLLM's server."""
    backend = settings.transfer and json.dumps({"backend": settings.transfer})
    flags = {
        "--model": settings.model,
        "--host": settings.host,
        "--port": settings.port,
        "--dtype": settings.dtype,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--max-model-len": settings.max_model_len,
        "--kv-cache-memory-bytes": settings.kv_cache_memory_bytes,
        "--weight-transfer-config": backend,
        "--worker-extension-cls": None if settings.teacher else NAME,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # not the model's top-p, top-k and penalties
    }
    given = [str(x) for flag, value in flags.items() if value is not None for x in (flag, value)]
    given += flags_of(settings.model, not settings.teacher, torch.cuda.is_available())
    quiet = ["--disable-uvicorn-access-log"]
    # The user's flags come last, because vLLM uses the last of several values.
    return ["-m", "vllm.entrypoints.openai.api_server", *given, *quiet, *settings.vllm]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("gpu7")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
