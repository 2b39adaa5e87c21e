# shellcheck shell=sh
# For the action "Run Shell Script" of Shortcuts: paste this; shell zsh (or sh), input "Shortcut Input",
# pass input "to stdin". What it prints is the action's result. docs/embedding.md has the steps.
exec "$HOME/.local/bin/dense-filter"
