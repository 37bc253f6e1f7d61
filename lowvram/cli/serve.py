"""`lowvram serve`: an OpenAI-compatible server for a model, and a chat page."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_device, add_precision, context_length, count, size_of_file, slot_count
from lowvram.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.serve.limits import Limits
    from lowvram.serve.prompt import ServedModel, Turn

_KEY = "LOWVRAM_API_KEY"
_KEYED = " Both ask for the API key."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible API, and a chat page in the browser",
        description="Serve a trained model at /v1, as OpenAI's API does, and a chat page at /. Needs the extra "
        "`serve`. Ctrl-C stops the server when running answers have ended; a second Ctrl-C cuts them off.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that other machines reach needs a key (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="port to listen on; 0: any free one (default: %(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"key that every client must send (default: ${_KEY}, or none)")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("base", "dialogue"),
        help="dialogue: answer in turns; base: continue a text (default: as trained)",
    )
    parser.add_argument(
        "--slots",
        type=slot_count,
        default=16,
        metavar="N",
        help="answers that are generated at once (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=context_length, metavar="N", help="tokens of context (default: the most that fit)"
    )
    parser.add_argument(
        "--queue", type=_length, default=64, metavar="N", help="requests that may wait (default: %(default)s)"
    )
    body_help = "largest request: bytes, or with KiB or MiB (default: %(default)s)"
    parser.add_argument("--max-body", type=_body_size, default="4MiB", metavar="SIZE", help=body_help)
    parser.add_argument(
        "--max-prompt", type=count, metavar="N", help="maximum tokens of a prompt (default: the context)"
    )
    parser.add_argument(
        "--max-output", type=count, metavar="N", help="maximum tokens of an answer (default: the context)"
    )
    add_precision(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load the model and serve it until Ctrl-C."""
    from lowvram.api.context import find_max_context
    from lowvram.api.loading import load_model
    from lowvram.cli.console import notice
    from lowvram.cli.tasks import run_task

    given = os.environ.get(_KEY) if arguments.api_key is None else arguments.api_key
    key = _choose_key(arguments.host, given)
    _require_extra()
    from lowvram.generate.decoder import Decoder
    from lowvram.serve.addresses import is_loopback
    from lowvram.serve.app import AccessPolicy, build_app
    from lowvram.serve.metrics import Metrics
    from lowvram.serve.scheduler import Scheduler
    from lowvram.serve.server import Server, open_socket

    # Before the model is read, so that an error about the address comes at once.
    with open_socket(arguments.host, arguments.port) as listening:
        loaded = run_task(load_model(arguments.checkpoint, arguments.device, arguments.precision))
        context = run_task(find_max_context(loaded, arguments.slots, arguments.context))
        limits = _build_limits(arguments, context.max_context)
        served = _describe(arguments, loaded, context.max_context)
        decoder = Decoder(loaded.model, context.max_context, limits.slots, loaded.dtype)
        scheduler = Scheduler(decoder, loaded.tokenizer, limits.queue, Metrics())
        app = build_app(served, scheduler, limits, AccessPolicy(key, is_loopback(arguments.host)))
        server = Server(app, scheduler, limits)
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        notice(f"{url}/ is a chat page, {url}/v1 is for OpenAI's clients." + (_KEYED if key else ""))
        notice(_describe_model(loaded, served))
        if context.warning:
            notice(context.warning, "yellow")
        waiting = f"{limits.slots} answers at once, {limits.queue} requests may wait"
        notice(f"Context of {context.reason} {waiting}. Ctrl-C ends.")
        server.serve_on(listening)
    notice("Stopped.", "dim")


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is not a port; ports are 0 to {2**16 - 1}")
    return number


def _length(text: str) -> int:
    from lowvram.serve.limits import LONGEST_QUEUE

    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    if number > LONGEST_QUEUE:
        raise argparse.ArgumentTypeError(f"{number} is more than {LONGEST_QUEUE:,}, the most that may wait")
    return number


def _body_size(text: str) -> int:
    from lowvram.serve.limits import LARGEST_BODY, SMALLEST_BODY
    from lowvram.units import show_bytes

    size = size_of_file(text)
    if not SMALLEST_BODY <= size <= LARGEST_BODY:
        bounds = f"{show_bytes(SMALLEST_BODY)} to {show_bytes(LARGEST_BODY)}"
        raise argparse.ArgumentTypeError(f"{text!r} is {show_bytes(size)}; a request may have {bounds}: 4MiB")
    return size


def _choose_key(host: str, key: str | None) -> str | None:
    """Return the key that clients must have; raises ConfigError where there has to be one."""
    from lowvram.serve.addresses import is_loopback

    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() and key):
        raise ConfigError(
            "--api-key is not a valid key.", "A header can hold visible ASCII characters only.", "Choose another."
        )
    if key is None and not is_loopback(host):
        raise ConfigError(
            f"--host is {host}, and there is no API key.",
            "Everybody who reaches that address could use the model.",
            f"Set {_KEY} (or give --api-key), or leave --host out to serve this machine alone.",
        )
    return key


def _require_extra() -> None:
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise MachineError(
            "The server's packages are not installed.",
            f"{error}.",
            "Type in the folder of lowvram: pip install -e '.[serve]'.",
        ) from error
    del starlette, uvicorn


def _build_limits(arguments: argparse.Namespace, max_context: int) -> Limits:
    from lowvram.serve.limits import MORE_CONNECTIONS, Limits

    longest = max(1, max_context - 1)
    return Limits(
        slots=arguments.slots,
        queue=arguments.queue,
        connections=arguments.slots + arguments.queue + MORE_CONNECTIONS,
        body_bytes=arguments.max_body,
        prompt_tokens=min(longest, arguments.max_prompt or longest),
        output_tokens=min(longest, arguments.max_output or longest),
    )


def _describe(arguments: argparse.Namespace, loaded: LoadedModel, max_context: int) -> ServedModel:
    """Return the served model under the name that clients use."""
    from lowvram.serve.prompt import ServedModel

    name = arguments.name or arguments.checkpoint.resolve().name
    encode = _find_encoder(loaded, arguments.form)
    return ServedModel(name, _fingerprint(loaded, arguments.checkpoint), loaded.tokenizer, max_context, encode)


def _fingerprint(loaded: LoadedModel, directory: Path) -> str:
    """Return a short hash of everything that an answer depends on, besides the request."""
    import torch

    import lowvram

    checkpoint = loaded.checkpoint
    weights = _hash_files(directory) if checkpoint is None else json.dumps(checkpoint.manifest, sort_keys=True)
    words = (weights, loaded.tokenizer.hash, loaded.precision, loaded.dtype, torch.__version__, lowvram.__version__)
    return "fp_" + hashlib.sha256("/".join(map(str, words)).encode("utf-8")).hexdigest()[:12]


def _hash_files(directory: Path) -> str:
    """Return the hashes of the files of another program's model and its tokenizer."""
    from concurrent.futures import ThreadPoolExecutor

    from lowvram.storage.disk import sha256

    # Hashing releases Python's lock, so threads hash at the same time.
    paths = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    with ThreadPoolExecutor() as pool:
        return " ".join(f"{path.name} {found}" for path, found in zip(paths, pool.map(sha256, paths), strict=True))


def _describe_model(loaded: LoadedModel, served: ServedModel) -> str:
    form = "answers in turns" if served.encode_chat else "continues texts"
    size = f"{loaded.config.num_parameters():,} parameters in {loaded.precision} ({loaded.reason})"
    return f"{served.name} {form}: {size}."


def _find_encoder(loaded: LoadedModel, form: str | None) -> Callable[[Sequence[Turn]], list[int]] | None:
    """Return the function that encodes a conversation; None for a model that continues texts."""
    from lowvram.generate.chat_template import Message, choose_template

    template = choose_template(loaded.tokenizer, form)
    if template is None:
        return None
    return lambda turns: template.encode(loaded.tokenizer, [Message(*turn) for turn in turns])
