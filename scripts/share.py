"""Share a finished run: push it to a repository on the Hugging Face hub, or upload it to an address.

    python scripts/share.py --adapter outputs --push_to_hub owner/name
    python scripts/share.py --adapter outputs --push_to_hub owner/name --hub_private_repo
    python scripts/share.py --adapter outputs --upload s3://bucket/folder

This sends adapter, tokenizer, settings, metrics, pictures and model card, but no checkpoints. The adapter is
read first, and nothing is sent if its weights are missing, damaged or NaN. The trainer does the same after
training if it is given --push_to_hub or --upload. Other programs can then load the
adapter from there: scripts/chat.py with --adapter s3://bucket/folder, vLLM with --lora-modules
name=owner/name.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

from minilora.adapters.save_load import read_adapter
from minilora.run.sharing import files_to_share, make_destinations, send_to_all
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--adapter", type=local_path, required=True)
    parser.add_argument("--push_to_hub")
    parser.add_argument("--hub_private_repo", action="store_true")
    parser.add_argument("--upload")
    options = parser.parse_args()
    read_adapter(options.adapter)  # raises UserError if a file is missing or damaged, or a number is NaN
    destinations = make_destinations(options.push_to_hub, options.hub_private_repo, options.upload)
    if not destinations:
        raise UserError("nowhere to send it to; add --push_to_hub owner/name or --upload s3://bucket/folder")
    send_to_all(destinations, files_to_share(options.adapter), "Upload adapter")


if __name__ == "__main__":
    run_script(main)
