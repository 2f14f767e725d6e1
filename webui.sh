#!/usr/bin/env bash
# Start the service with the flags of AUTOMATIC1111 and Forge; see launch.py.
cd "$(dirname "$0")" || exit 1
# AUTOMATIC1111 reads COMMANDLINE_ARGS and python_cmd from this file
if [ -f webui-user.sh ]; then
    # shellcheck source=/dev/null
    . ./webui-user.sh
    export COMMANDLINE_ARGS
fi
exec "${python_cmd:-python3}" launch.py "$@"
