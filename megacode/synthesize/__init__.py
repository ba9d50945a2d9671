"""Problem-solving data from served models (`megacode synthesize`): records in, new records out.

1. `schema`: a synthesis file names inputs, an operator, models and checks; `operator`: the
   operator's file says what is asked of which model, how answers are read, and what is rejected.
2. `make` draws candidates (a record and a number of the sample) in order and runs the operator's
   steps for many at a time; `served` sends requests within the models' limits; `journal` keeps
   every reply, so that none is paid twice.
3. `checks` looks at candidates in their order: answers, votes, near-duplicates, held-out sets.
4. `output` writes what was accepted, what was rejected and why, and a manifest.
"""
