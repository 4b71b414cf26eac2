"""Send a finished run to others: to a repository on the Hugging Face hub, or to an address.

    python scripts/share.py --adapter outputs --push_to_hub owner/name
    python scripts/share.py --adapter outputs --push_to_hub owner/name --hub_private_repo
    python scripts/share.py --adapter outputs --upload s3://bucket/folder

Adapter, tokenizer, settings, metrics, pictures and model card go; checkpoints stay. The trainer does the same
by itself where it is given --push_to_hub or --upload. Afterwards the adapter is found there: scripts/chat.py
--adapter s3://bucket/folder, vLLM's --lora-modules name=owner/name.
"""

import sys
from pathlib import Path

from minilora.formats.adapter import read_adapter_config
from minilora.run.sharing import destinations, files_to_share, send_to_all
from minilora.system.errors import ArgumentParser, UserError, run_script


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return
    parser = ArgumentParser()
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--push_to_hub")
    parser.add_argument("--hub_private_repo", action="store_true")
    parser.add_argument("--upload")
    options = parser.parse_args()
    read_adapter_config(options.adapter)  # refuses what is no adapter
    found = destinations(options.push_to_hub, options.hub_private_repo, options.upload)
    if not found:
        raise UserError("nowhere to send it to; add --push_to_hub owner/name or --upload s3://bucket/folder")
    send_to_all(found, files_to_share(options.adapter), "Upload adapter")


if __name__ == "__main__":
    run_script(main)
