"""`ftray serve`: the endpoint on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING, Any

from ftray.cli.signals import stop_on_signal
from ftray.cli.words import facts, size, table
from ftray.engine.memory import MemoryPlan, memory_plan
from ftray.errors import EXIT_OK, ModelError, RunStopped
from ftray.model.source import find_shapes
from ftray.model.states import GIB
from ftray.session import in_a_job

if TYPE_CHECKING:
    from serve.config import ServeFile


def serve_command(where: str, overrides: list[str], *, check: bool, as_json: bool, verbose: bool) -> int:
    """Check a SERVE.yaml, and run it until Ctrl-C or SIGTERM."""
    from serve.config import load_serve
    from serve.tenants import read_tenants

    file = load_serve(where, overrides)
    if file.config.tenants:
        read_tenants(file.config.tenants, file.config.ingress.replicas)
    if check:
        print(check_json(file) if as_json else f"{to_yaml(file)}\n{describe(file)}\n\n{memory_text(file)}")
        return EXIT_OK
    from serve.local import running, session

    def say(text: str) -> None:
        print(json.dumps({"kind": "status", "text": text}) if as_json else text, flush=True)

    say(f"starting Ray and {file.config.name_of_base}")
    stopping = "stopping: answers in the making come first; once more leaves at once"
    with session(file, verbose=verbose), stop_on_signal(lambda _: say(stopping)) as stop:

        def not_stopped() -> None:
            if stop.is_set():
                raise RunStopped("stopped before it was ready")

        with running(file, verbose=verbose, wait=not_stopped) as address:
            if as_json:
                print(json.dumps({"kind": "ready", "address": address}), flush=True)
            else:
                print(f"\n{ready_text(file, address)}\n", flush=True)
            if not in_a_job():
                _until(stop)
    return EXIT_OK


def _until(stop: threading.Event) -> None:
    while not stop.wait(0.5):
        pass


def describe(file: ServeFile) -> str:
    """What a file comes to, in a few lines."""
    config, options = file.config, file.http_options
    replicas = config.replicas
    count = f"{replicas.min}" if replicas.min == replicas.max else f"{replicas.min} to {replicas.max}"
    weights = "NF4" if config.quantization == "nf4" else config.precision
    return facts(
        [
            ("base", f"{config.model.path} in {weights}, called base or {config.name_of_base}"),
            ("adapters", config.registry or "none: no registry is set"),
            ("engine", f"{count} × {config.engine.slots} answers at once, {config.engine.queue} waiting"),
            ("keys", config.tenants or "none: it answers this machine alone"),
            ("admin calls", "with the admin key" if config.admin_key_sha256 else "off: no admin_key_sha256"),
            ("address", f"{options.host}:{options.port}"),
        ],
        indent=0,
    )


def plan_of(file: ServeFile) -> MemoryPlan:
    """Raises ModelError where the base's shapes are not to be found."""
    config = file.config
    return memory_plan(
        find_shapes(config.model)[0],
        config.engine,
        quantized=config.quantization == "nf4",
        precision=config.precision,
        gpu=config.replicas.gpus != 0,
        adapters=config.registry is not None,
    )


def memory_text(file: ServeFile) -> str:
    """The memory plan, and what it comes to."""
    try:
        plan = plan_of(file)
    except ModelError as error:  # a file may be checked far from the machine that has the base
        return f"memory: not known here, since the base is not: {error}"
    rows = [(i.name, size(i.bytes), "host" if i.place == "host" else "device", i.how) for i in plan.items]
    rows.append(("total", size(plan.total_gib * GIB), "device", ""))
    device = "on a CPU" if file.config.replicas.gpus == 0 else "as on a GPU"
    return (
        f"memory of a replica, at most: {plan.need.slots:,} slots of {plan.need.context:,} places; prompts are read"
        f" {device}, {plan.need.prompt_tokens:,} tokens a step\n\n"
        f"{table(('what', 'memory', 'where', 'how'), rows, right=(1,))}"
    )


def check_json(file: ServeFile) -> str:
    """The resolved file, and the plan beside it."""
    try:
        plan: dict[str, Any] = plan_of(file).to_json()
    except ModelError as error:
        plan = {"error": str(error)}
    return json.dumps(file.dump() | {"plan": plan}, indent=2)


def ready_text(file: ServeFile, address: str) -> str:
    """What is said once it answers."""
    key = " -H 'Authorization: Bearer KEY'" if file.config.tenants else ""
    body = '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
    lines = [
        describe(file),
        "",
        f"ready: open {address}/ or ask",
        f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    ]
    if not file.config.tenants:
        lines.append("no keys are configured, so it answers this machine alone: for others, write a file of tenants")
    return "\n".join(lines if in_a_job() else [*lines, "Ctrl-C stops it"])


def to_yaml(file: ServeFile) -> str:
    import yaml

    return yaml.safe_dump(file.dump(), sort_keys=False, allow_unicode=True, width=110)


def new_key_command(*, as_json: bool) -> None:
    """Print a key, once, and what the files say of it."""
    from serve.tenants import new_key

    key, digest = new_key()
    if as_json:
        print(json.dumps({"key": key, "sha256": digest}))
        return
    print(facts([("key", key), ("sha256", digest)], indent=0))
    print("\nGive the key to its owner: it is not shown again, and stands nowhere.", file=sys.stderr)
    print("Write the sha256 into the tenants' file (tenants.NAME.keys), or as admin_key_sha256.", file=sys.stderr)


def example_command() -> None:
    """Print a SERVE.yaml to start from."""
    from serve.config import EXAMPLE

    print(EXAMPLE, end="")
