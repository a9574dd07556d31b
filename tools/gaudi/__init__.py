"""`python -m tools.gaudi.check FILE`: whether models change places as they should on a Gaudi.

`check` is the program. `facts` reads what is there, `server` runs ours, `judge` says what is wrong
with what was seen, and `private` removes names and folders from it. `interrupts` makes sure that
our server is stopped whatever ends the check. `expected` has made `expected.json`; `inside` goes
into the engine host, to read the device's memory there.
"""
