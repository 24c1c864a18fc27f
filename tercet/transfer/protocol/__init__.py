"""The handover as messages and two state machines. No I/O, no threads, no clock."""
