"""Recipe and run folder -> a trained model.

1. `trainer.Trainer` is a run that trains: its loop reads like the algorithm.
2. `online` decides shares between blocks of steps, where a phase asks for it.
3. `report_steps` gathers and writes metrics; `progress` tells people; `profile` profiles steps.
4. `stop` lets every rank stop after the same step; `garbage` keeps Python's collector out of steps.
"""
