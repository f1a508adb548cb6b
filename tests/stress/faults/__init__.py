"""Injects faults into runs, and checks that they end as they would have without the faults.

Command     python -m tests.stress.faults [--kills 50] [--seed 0] [--output FILE]
                                        [--only kills signals ...] [--signals 5] [--damages 24]

The bench first makes a small run without faults, on a slice of the shapes data set, with several
checkpoints per epoch. Then it repeats the run in other folders with faults; after each fault the
same command resumes. A fault is survived if the run finishes and

  - metrics.jsonl and result.json are the same except for times, date and command,
  - every array of the last checkpoint is the same bit for bit, as Orbax alone reads it,
  - no checkpoint that was committed when the fault struck is lost,
  - the run prints the expected message and ends with the expected exit status.

Any other outcome counts as lost, is printed at once, and makes the exit status 1. Kills use
SIGKILL, half of them at a random time and half within a random phase of a save. `worker` describes
how a save is stretched; the package itself is not changed for it.
"""
