"""The dashboards as Python and as files: what each panel must have, and what its queries must not do."""
