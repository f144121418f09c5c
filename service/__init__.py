"""Weir: one stateless LLM service between applications and OpenAI-compatible models."""

import sys

__version__ = "0.2.0"


def _load_structlog_without_rich() -> None:
    """structlog loads rich wherever it is installed: 6 MB in each process, for tracebacks that nobody shows.

    Only `service.top` draws with it, and finds it all the same.
    """
    if "rich" in sys.modules or "structlog" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # import takes None for: there is no such module
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]


_load_structlog_without_rich()
