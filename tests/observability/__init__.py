"""A scripted traffic run against real processes, scraped by a real Prometheus, and what it must show."""
