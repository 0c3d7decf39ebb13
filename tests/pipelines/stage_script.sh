#!/bin/sh
# Stands in for `python3 -m diffdefend_core` inside a container: writes a stage's outputs, computes nothing. In the store
# a file `fails` makes evaluate fail, `dies` makes it end without a word, `hangs` makes it wait.
shift 2
stage=$1
shift
echo "log of $stage on $DIFFDEFEND_DEVICE" >&2
while [ $# -gt 0 ]; do
  case "$1" in
    --source | --model | --trigger | --verdict | --candidate) before=$2 ;;
    --store) store=${2#file://} ;;
    --uri-output) uri=$2 ;;
    --word-output) word=$2 ;;
    --outcome-output) outcome=$2 ;;
    --report-output) report=$2 ;;
    --metrics-output) metrics=$2 ;;
  esac
  shift
  [ $# -eq 0 ] || shift
done
model=${before%%>*}
if [ "$stage" = load ]; then
  [ -d "$model" ] || echo "load does not see the model" >&2
elif [ -e "$model" ]; then
  echo "$stage sees the model" >&2
fi
if [ "$stage" = evaluate ] && [ -e "$store/fails" ]; then
  echo "diffdefend: error: evaluate found x; expected y; do z" >&2
  exit 2
fi
[ "$stage" != evaluate ] || [ ! -e "$store/dies" ] || exit 137
[ "$stage" != evaluate ] || [ ! -e "$store/hangs" ] || sleep 600
write() {
  mkdir -p "$(dirname "$1")"
  echo -n "$2" > "$1"
}
write "$uri" "$before>$stage"
[ -z "$word" ] || write "$word" clean
[ -z "$outcome" ] || write "$outcome" promoted
[ -z "$report" ] || write "$report" "<p>report</p>"
[ -z "$metrics" ] || write "$metrics" "{}"
