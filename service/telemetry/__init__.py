"""Metrics: what is counted, within bounds, and the page that a scraper reads."""

from service.telemetry.catalogue import DURATION_BUCKETS, FIRST_TOKEN_BUCKETS, MOST_SERIES
from service.telemetry.labels import OTHER, BoundedLabel
from service.telemetry.page import exposition, merged_registry
from service.telemetry.recorder import MAX_MODELS, MAX_TENANTS, Metrics

__all__ = (
    "DURATION_BUCKETS",
    "FIRST_TOKEN_BUCKETS",
    "MAX_MODELS",
    "MAX_TENANTS",
    "MOST_SERIES",
    "OTHER",
    "BoundedLabel",
    "Metrics",
    "exposition",
    "merged_registry",
)
