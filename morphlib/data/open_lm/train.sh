#!/bin/sh
# {shape}: {steps:,} steps of {step_tokens:,} tokens are {tokens:,} tokens. Usage, after prepare_data.sh: sh train.sh
# It needs open_lm: pip install "open_lm @ git+https://github.com/mlfoundations/open_lm@9bb92ef1689333534b7057942a20d18a46d1fa52"
set -eu
torchrun --nproc-per-node {gpus} -m open_lm.main \
  --model model.json \
  --dataset-manifest shards/manifest.jsonl \
  --data-key json.gz \
  --train-num-samples {chunk_tokens} \
  --epochs {chunks} \
  --global-batch-size {batch} \
  --accum-freq {accumulate} \
  --lr {learning_rate} \
  --lr-cooldown-end {final_rate:.6g} \
  --warmup {warmup_steps} \
  --beta1 {beta1} \
  --beta2 {beta2} \
  --eps {epsilon} \
  --wd {weight_decay} \
  --grad-clip-norm {clip} \
  --z-loss-coefficient {z_loss} \
  --precision {precision} \
  --seed {seed} \
  --workers 1 \
  --logs logs \
  --name {name} \
  --resume latest \
  {flags}
