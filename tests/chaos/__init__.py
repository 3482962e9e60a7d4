"""Chaos: good clients that check every answer, beside hostile and dying ones, at one broker.

    python -m tests.chaos --seconds 600 --seed 1      a run; the seed fixes what everybody does
    python -m tests.chaos --seed 1 --plan plan.json   only that: each actor's list of steps
    python -m tests.chaos --replay FILE               feed a recorded run into a fresh lender

The plan is a pure function of the seed.  What comes of it is not: the kernel decides who is first.
So every event that the broker's lender gets is recorded in order, with what came of it, and the
lender, which has no clock, socket or pid of its own, must do exactly the same when it is fed with
the recording again: same results and errors, same notifications for others, same closes, same bytes
in the ledger.  What was decided wrongly in a run can so be looked at as often as one likes.

    plan.py       who does what, from the seed          board.py     what all actors write into
    stage.py      the broker's entries and rules        broker.py    the broker, with a recorder
    good.py       clients that check every answer       record.py    the recorder
    own.py        ... and what they do with their own   replay.py    the same events once more
    dying.py      who is killed, forks, executes        planted.py   mistakes that must be found
    hostile.py    who breaks every rule                 run.py       a run, from start to verdict
"""
