"""Memory guard: budgets, host limits, the ledger of every block, the pool, and the report of a refusal."""
