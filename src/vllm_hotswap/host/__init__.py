"""The engine host process: every loaded engine, and the loop that steps the active one."""
