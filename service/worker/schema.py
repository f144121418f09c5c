"""The tables in PostgreSQL, as the steps that made them. `{schema}` is the schema's name.

A step only adds, so that an older worker goes on with newer tables, and a step that was released is never
changed. A column of `records.COLUMNS` needs a step here; a test compares.
"""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final = (
    # 1
    """
    CREATE TABLE {schema}.weir_ledger (
        id text PRIMARY KEY,
        request_id text,
        tenant text NOT NULL,
        api_key text NOT NULL,
        admin boolean,
        priority text,
        started_at timestamptz NOT NULL,
        route text,
        operation text,
        request_model text,
        response_model text,
        answered_by text,
        provider text,
        upstream text,
        stream boolean,
        outcome text NOT NULL,
        error_code text,
        input_tokens bigint,
        output_tokens bigint,
        cached_input_tokens bigint,
        cache_write_tokens bigint,
        reasoning_tokens bigint,
        audio_input_tokens bigint,
        audio_output_tokens bigint,
        usage_source text,
        cost_usd numeric,
        cost_source text,
        cache text,
        saved_usd numeric,
        attempts bigint,
        duration_seconds double precision,
        queue_seconds double precision,
        upstream_seconds double precision,
        overhead_seconds double precision,
        time_to_first_token_seconds double precision,
        time_per_output_token_seconds double precision,
        finish_reason text,
        response_id text,
        upstream_request_id text,
        conversation_id text,
        trace_id text,
        extra jsonb,
        copied_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX weir_ledger_by_tenant ON {schema}.weir_ledger (tenant, started_at);
    CREATE INDEX weir_ledger_by_time ON {schema}.weir_ledger USING brin (started_at);
    CREATE TABLE {schema}.weir_ledger_cursors (
        stream text PRIMARY KEY,
        tenant text NOT NULL,
        last_id text NOT NULL,
        position bigint NOT NULL,
        lost bigint NOT NULL DEFAULT 0,
        moved_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE {schema}.weir_ledger_rejected (
        stream text NOT NULL,
        entry_id text NOT NULL,
        reason text NOT NULL,
        content bytea,
        rejected_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (stream, entry_id)
    );
    """,
)
