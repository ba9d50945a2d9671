"""What the loop and the verbs ask of a model.

1. `model` is a model as the loop or a verb holds it.
2. `validation` measures loss by source and domain, `likelihood` scores texts, `generate` writes
   them.
3. `tasks` reads tasks, `probes` makes some from seeds. `scoring` puts them to a model; `checking`
   tells which written answers pass; `lecs` asks which code is equivalent.
4. `harness` runs tasks of lm-evaluation-harness; `harness_model` is the model that it asks.
5. `statistics` gives intervals over seeds and items, paired differences, slopes, adjusted p values.
6. `checkpoints` does all this for every checkpoint of a run.
"""
