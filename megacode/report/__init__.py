"""A plan or a run folder -> tables, plots, one HTML page.

1. `plan_tables`, `plan_costs` and `plan_plot` show a plan.
2. `run_data` reads a run's folder. `tables`, `figures` and `comparison` (of several runs) make its
   tables and plots; `page` puts them on one HTML page.
3. `drawing` has the plots' style, axes and files, `curves` their lines, `palette` all colours.
4. `preprocessing` shows how a corpus is tokenized, `document_lengths` plots its documents.
"""
