#!/usr/bin/env bash
# Starts the service with the flags of the stack that Alphalayer replaces; see launch.py.
cd "$(dirname "$0")" || exit 1
# where that stack's users keep COMMANDLINE_ARGS and python_cmd
if [ -f webui-user.sh ]; then
    # shellcheck source=/dev/null
    . ./webui-user.sh
    export COMMANDLINE_ARGS
fi
exec "${python_cmd:-python3}" launch.py "$@"
