"""Hurts runs in every way we know, and checks that what they end with is what it would have been.

Command     python -m tests.stress.faults [--kills 50] [--seed 0] [--output FILE]
                                        [--only kills signals ...] [--signals 5] [--damages 24]

A small run on a slice of the embedded data, with several checkpoints per epoch, is first made
without faults. Then it is made again and again, in other folders and with faults; after each the
same command goes on. A fault is survived if the run comes to its end and

  - metrics.jsonl and result.json are the same but for clocks, date and command,
  - every array of the last checkpoint is the same bit for bit, as Orbax alone reads it,
  - no checkpoint that was in its place when the fault struck is lost,
  - and it says what it should, with the exit status it should.

Everything else is lost, said at once, and makes the exit status 1. A kill is by SIGKILL, half of
them at a random time and half within a random phase of a save. See `worker` for how a save
is stretched; nothing of the package is changed for it.
"""
