"""`llm-pg watch RUN`: the page of a run, served while the run goes on. Reads the run's folder and writes nothing."""
