"""Runs one contender in a process of its own: `python -m bench.contenders NAME prepare|run`."""

from __future__ import annotations

import sys
from importlib import import_module

import uvloop

from bench.contenders.task import Task

name, step = sys.argv[1:]
uvloop.run(getattr(import_module(f"bench.contenders.{name}"), step)(Task.here()))
