"""The command line: `python -m service [COMMAND]`, with `serve` as the COMMAND if none is named."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path

from service import __version__
from service.auth import hash_key, make_key
from service.config import Configuration, Settings, load, load_settings
from service.errors import ConfigurationError
from service.logging import configure

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: a wrong setting; starting again does not help."""

SMOKE_OPTIONS = (
    ("WEIR_URL", "http://127.0.0.1:8000", "address of the API"),
    ("WEIR_ADMIN_URL", "http://127.0.0.1:9000", "address of the admin port"),
    ("WEIR_PODS_URL", None, "a name with the addresses of all pods, for the check of conversations"),
    ("WEIR_API_KEY", None, "API key"),
    ("WEIR_MODEL", None, "model to ask, the first of the list if none"),
    ("RATE_LIMIT_REQUESTS", None, "the limit that is set, for the check of it"),
)
"""Variable, default, meaning. From the environment too, so that a key is in no list of processes."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description="Weir, an LLM service.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="answer requests (the default)")
    commands.add_parser("worker", help="copy the ledger from Redis into PostgreSQL: docs/ledger.md")
    commands.add_parser("check-config", help="check the settings and the files that they name, no more")
    key = commands.add_parser("make-key", help="print a new API key and the entry for the file of keys")
    key.add_argument("--name", default="my-app", help="what the key is called in logs and metrics")
    key.add_argument("--tenant", default="default", help="the tenant that it belongs to")
    smoke = commands.add_parser("smoke", help="ask a running Weir, from outside, whether all is well")
    smoke.add_argument(
        "check", nargs="*", help="auth, chat, stream, conversation, metrics or limit; all if none"
    )
    for name, default, text in SMOKE_OPTIONS:
        option = "--" + name.removeprefix("WEIR_").lower().replace("_", "-")
        smoke.add_argument(
            option, default=os.environ.get(name, default), metavar=name, help=f"{text}; else {name}"
        )
    _add_reconcile(
        commands.add_parser("reconcile", help="compare a provider's usage export with Weir's own sums")
    )
    _add_top(commands.add_parser("top", help="show what a service does just now: docs/top.md"))
    for command in (parser, serve):
        command.add_argument("--welcome", action="store_true", help="print what to try next")
    options = parser.parse_args(arguments)
    if options.command == "make-key":
        return _make_key(options.name, options.tenant)
    if options.command == "smoke":
        return _smoke(options)
    if options.command == "reconcile":
        return _reconcile(options)
    if options.command == "top":
        return _top(options)
    try:
        if options.command == "worker":
            return _work(load_settings())
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
    configure(settings.level, settings.log_format)
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


def _work(settings: Settings) -> int:
    configure(settings.level, settings.log_format)
    from service.worker.run import work

    work(settings)
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


def _add_reconcile(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="JSON or CSV of the provider: docs/usage.md")
    for name, default, text in SMOKE_OPTIONS:
        if name in ("WEIR_URL", "WEIR_API_KEY"):
            option = "--" + name.removeprefix("WEIR_").lower().replace("_", "-")
            command.add_argument(
                option, default=os.environ.get(name, default), metavar=name, help=f"{text}; else {name}"
            )
    command.add_argument("--tenant", help="Weir's sums of this tenant; an admin's key has all")
    command.add_argument("--from", dest="since", metavar="DAY", type=_a_day, help="the file's first day")
    command.add_argument("--to", dest="until", metavar="DAY", type=_a_day, help="the day after its last")
    command.add_argument(
        "--by", default="day,model", choices=("day,model", "day", "model"), help="what is told apart"
    )
    command.add_argument(
        "--tolerance", default="0.5%", type=_a_share, metavar="PERCENT", help="of the provider's number"
    )
    command.add_argument(
        "--map",
        action="append",
        default=[],
        type=_a_pair,
        metavar="PROVIDERS=WEIRS",
        help="the provider's name of a model, and Weir's, or several with commas; may be repeated",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _a_day(text: str) -> str:
    return f"{date.fromisoformat(text)}"


def _a_share(text: str) -> Decimal:
    try:
        share = Decimal(text.removesuffix("%")) / 100
    except InvalidOperation:
        raise ValueError(text) from None
    if not 0 <= share <= 1:
        raise ValueError(text)
    return share


def _a_pair(text: str) -> tuple[str, list[str]]:
    theirs, _, ours = text.partition("=")
    names = [name for name in ours.split(",") if name]
    if not theirs or not names:
        raise ValueError(text)
    return theirs, names


def _reconcile(options: argparse.Namespace) -> int:
    """0: all within the tolerance; 1: not all; 2: there is nothing to compare, and why."""
    from service import reconcile

    target = reconcile.Target(options.url.rstrip("/"), options.api_key, options.tenant)
    try:
        export, report = reconcile.run(
            options.file,
            target,
            since=options.since,
            until=options.until,
            by=tuple(options.by.split(",")),
            tolerance=options.tolerance,
            names=dict(options.map),
        )
    except reconcile.Unreadable as error:
        print(f"weir: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(reconcile.as_json(report), indent=2))
    else:
        print(f"{options.file} ({export.kind}) beside {target.url}, days in UTC")
        for line in reconcile.tell(report, options.tolerance):
            print(line)
    return 0 if report.within else 1


def _add_top(command: argparse.ArgumentParser) -> None:
    port = os.environ.get("ADMIN_PORT", "9000")
    command.add_argument(
        "url",
        nargs="*",
        metavar="URL",
        default=[os.environ.get("WEIR_ADMIN_URL", f"http://127.0.0.1:{port}")],
        help="address of a pod's admin port, several for several pods; "
        "else WEIR_ADMIN_URL, else this machine's ADMIN_PORT",
    )
    command.add_argument(
        "--interval", type=_an_interval, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )
    command.add_argument(
        "--once", action="store_true", help="print one report and end; so without a terminal"
    )
    command.add_argument("--json", action="store_true", help="print one report as JSON and end")


def _an_interval(text: str) -> float:
    seconds = float(text)
    if not 0.2 <= seconds <= 3600:
        raise ValueError(text)
    return seconds


def _top(options: argparse.Namespace) -> int:
    """0: it was ended; 1: nobody answers; 2: there is no such address."""
    from service.top.run import NobodyAnswers, top
    from service.top.scraping import metrics_url

    try:
        urls = list(dict.fromkeys(map(metrics_url, options.url)))
    except ValueError as error:
        print(f"weir: {error}", file=sys.stderr)
        return 2
    try:
        top(urls, interval_seconds=options.interval, once=options.once, as_json=options.json)
    except NobodyAnswers as error:
        print(f"weir: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _smoke(options: argparse.Namespace) -> int:
    from service.smoke import CHECKS, Target, run

    unknown = set(options.check) - set(CHECKS)
    limit = options.rate_limit_requests
    if unknown or (limit is not None and not str(limit).isdigit()):
        what = (
            f"no check {min(unknown)!r}; there are {', '.join(CHECKS)}" if unknown else f"no number: {limit}"
        )
        print(f"weir: {what}", file=sys.stderr)
        return EXIT_CONFIGURATION
    target = Target(
        options.url.rstrip("/"),
        options.admin_url.rstrip("/"),
        options.api_key,
        options.model,
        int(limit) if limit is not None else None,
        options.pods_url,
    )
    failed = 0
    for result in run(options.check or CHECKS, target):
        word = {True: "good", False: "FAILED", None: "skipped"}[result.good]
        print(f"{result.check}: {word}: {result.told}", flush=True)
        failed += result.good is False
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
