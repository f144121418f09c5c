"""Dashboards for Grafana, written in Python: `python -m dashboards` writes their JSON into the chart."""
