#!/bin/sh
# Runs a program as a child of PID 1. Inside a container nothing can kill or stop PID 1 itself, and killing
# and stopping the program is what `meshdemo fault --crash` and `--hang` do.
"$@" &
child=$!
trap 'kill -TERM "$child"' TERM INT
wait "$child"
status=$?
# A trapped signal ends `wait` early: wait until the program is gone.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  status=$?
done
exit "$status"
