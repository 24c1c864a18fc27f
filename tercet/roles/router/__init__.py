"""Which workers serve a request, and what becomes of it. Decisions are data in, data out; only router.py does I/O.

directory   who lives, and what is known of each          line      who is planned next
policy      which workers a request gets, and why          attempt   one try at a request
decisions   the whole as a state machine: verbs and reports in, effects out. No I/O, no clock, no randomness
router      carries the effects out, over one stream a worker
"""
