"""Command lines that would succeed with the good files. A case breaks one thing in them."""

TRAIN = "train --config run.yaml --output_dir out"
PREPARE = "prepare --model model --dataset train.jsonl --output out"
EVALUATE = "evaluate --adapter adapter --dataset train.jsonl"
CHAT = "chat --adapter adapter --instruction say"
MERGE = "merge --adapter adapter --output out"
EXPORT = "merge --adapter adapter --export_adapter out"
MEMORY = "memory --model model"
COMPARE = "compare run"
CONVERT = "convert --model model --output out"
COMBINE = "combine --adapter adapter:0.5 --output out"
EXTRACT = "extract --base model --tuned tuned --lora_rank 2 --output out"
LINT = "lint_adapter adapter --model model"
SERVE = "serve --adapter adapter --port 0 --dry_run"
SHARE = "share --adapter adapter --push_to_hub owner/name"
RESUME = "train --config run.yaml --output_dir run --resume_from_checkpoint latest --overwrite_output_dir"
CHAT_TEMPLATE = (
    "train --config run.yaml --model words --dataset chat.jsonl --output_dir out --template tokenizer"
)

READ_A_MODEL = (TRAIN, PREPARE, EVALUATE, MEMORY, MERGE, LINT)
READ_WEIGHTS = (TRAIN, EVALUATE, CHAT, MERGE, SERVE)
READ_AN_ADAPTER = (EVALUATE, CHAT, MERGE, EXPORT, SHARE, SERVE)
READ_A_TOKENIZER = (TRAIN, PREPARE, EVALUATE, CHAT, MERGE, SERVE)
