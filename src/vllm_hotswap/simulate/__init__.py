"""Switching under virtual time: the scheduler and the policies of the server, on a trace."""
