#!/bin/sh
# Required parameters:
# @raycast.schemaVersion 1
# @raycast.title Solve Densely
# @raycast.mode fullOutput
#
# Optional parameters:
# @raycast.packageName DenseSteer
# @raycast.argument1 { "type": "text", "placeholder": "problem" }
# @raycast.argument2 { "type": "text", "placeholder": "strength", "optional": true }
#
# Documentation:
# @raycast.description Solve a problem in few, dense steps, with a steered local model.

# The problem goes through standard input: it may begin with a dash, or hold quotes.
if [ -n "${2-}" ]; then
    DENSESTEER_STRENGTH=$(printf '%s' "$2" | tr , .) # 0,5 is 0.5
    export DENSESTEER_STRENGTH
fi
printf '%s' "$1" | "$HOME/.local/bin/dense-filter"
