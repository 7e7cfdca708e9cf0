"""What does the same job: send each message once, 100 at a time, and keep the answer.

Each module has `LABEL` (its name for people), `SETTINGS` (what was set, and why), `SHARE` (its
messages in a run, as a share of the dispatcher's, so that all runs take about as long),
`RECORDED` (the query that counts the messages whose answer is kept; None without a database),
and the coroutines `prepare`, which leaves the messages waiting, and `run`.
"""
