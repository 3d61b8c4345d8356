#!/bin/sh
# Tokenizes DCLM-Baseline 1.0 (https://huggingface.co/datasets/mlfoundations/dclm-baseline-1.0, CC BY 4.0) into shuffled shards.
# Usage: sh prepare_data.sh FOLDER_WITH_DCLM. Give it at least {tokens:,} tokens, since no text is read twice.
set -eu
python -m open_lm.datapreprocess.ray.tokenize_shuffle --input "$1" --output shards --content_key text \
  --tokenizer {tokenizer} --seqlen {sequence} --wds_chunk_size {shard_sequences} --seed {data_seed}
