"""The command line: `python -m service [serve | check-config | make-key]`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

from service import __version__
from service.auth import hash_key, make_key
from service.config import Configuration, load
from service.errors import ConfigurationError
from service.logging import configure

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: a wrong setting; starting again does not help."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description="Weir, an LLM service.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="answer requests (the default)")
    commands.add_parser("check-config", help="check the settings and the files that they name, no more")
    key = commands.add_parser("make-key", help="print a new API key and the entry for the file of keys")
    key.add_argument("--name", default="my-app", help="what the key is called in logs and metrics")
    key.add_argument("--tenant", default="default", help="the tenant that it belongs to")
    for command in (parser, serve):
        command.add_argument("--welcome", action="store_true", help="print what to try next")
    options = parser.parse_args(arguments)
    if options.command == "make-key":
        return _make_key(options.name, options.tenant)
    try:
        configuration = load()
        if options.command == "check-config":
            return _checked(configuration)
        return _serve(configuration, welcome=options.welcome)
    except ConfigurationError as error:
        print(f"weir: {error.message}", file=sys.stderr)
        return EXIT_CONFIGURATION


def _serve(configuration: Configuration, *, welcome: bool) -> int:
    settings = configuration.settings
    say = partial(print, flush=True) if welcome else None
    configure("debug" if settings.debug else settings.log_level, settings.log_format)
    if settings.worker_count == 1:
        from service.serve import serve

        serve(configuration, say)
        return 0
    directory, master = tempfile.mkdtemp(prefix="weir-metrics-"), os.getpid()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    from service.workers import serve_workers

    try:
        serve_workers(configuration, say)
    finally:
        if os.getpid() == master:  # forked workers leave through here too
            shutil.rmtree(directory)
    return 0


def _checked(configuration: Configuration) -> int:
    names = ", ".join(f"{u.name} ({u.kind.value})" for u in configuration.upstreams)
    print(
        f"good: upstreams {names}; {len(configuration.file.models) or 'all'} models; "
        f"{len(configuration.keys)} keys; default model {configuration.default_model}"
    )
    return 0


def _make_key(name: str, tenant: str) -> int:
    key = make_key()
    print(f"# The key, shown this once; give it to {name}:\n{key}\n")
    print("# The entry for WEIR_KEYS_FILE; only this is kept:\nkeys:")
    print(f'  - name: "{name}"\n    tenant: "{tenant}"\n    sha256: "{hash_key(key)}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
