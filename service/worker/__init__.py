"""The worker: what runs beside the pods. It copies the ledger from Redis into PostgreSQL."""
