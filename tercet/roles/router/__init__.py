"""Which workers serve a request, and what becomes of it. Decisions are data in, data out; only router.py does I/O.

directory   live workers, and what is known of each       line      which request is planned next
policy      which workers a request gets, and why          attempt   one try at a request
record      what a choice of workers was made from, and the same choice again
decisions   the whole as a state machine: verbs and reports in, effects out. No I/O, no clock, no randomness
router      carries the effects out, over one stream per worker
"""
