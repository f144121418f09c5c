"""The fleet's one state: conversations, limits and the ledger in Redis, each behind its port."""
