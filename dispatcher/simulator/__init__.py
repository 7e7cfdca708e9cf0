"""A stand-in for the provider: a real HTTP server with its rules, faults and delivery reports.

It shares no code with the rest of the program, so that a misunderstanding of the provider cannot
hide in its own tests.
"""
