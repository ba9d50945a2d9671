"""A plan or a run folder -> tables, plots, one HTML page.

1. `plan_tables`, `plan_costs`, `plan_packing`, `plan_plot` show a plan.
2. `run_data` reads a run's metrics; `curves`, `tables`, `figures`, `comparison` make of them what `page` puts on one page.
3. `drawing`, `palette`, `document_lengths` draw; `preprocessing` shows how a corpus is tokenized.
"""
