"""Pages of documentation made from the code: `python -m llm_pg.guides.metrics docs/metrics.md`, `.api`, `.from_trl`."""
