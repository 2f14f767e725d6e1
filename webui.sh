#!/usr/bin/env bash
# Starts the service with the flags of the stack that Alphalayer replaces; see launch.py.
cd "$(dirname "$0")" || exit 1
exec "${python_cmd:-python3}" launch.py "$@"
