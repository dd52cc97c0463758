"""The fault lab: what can go wrong at both ends of the wire, played against a real process.

`cases` is the one table: what happens, what the client gets, what the counters say. `lab` plays
its rows and holds the process to them; `page` writes them into `docs/faults.md`.
"""
