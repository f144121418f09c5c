"""Pictures of the dashboards, from a Prometheus that has scraped the scripted run."""
