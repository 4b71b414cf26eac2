# %% [markdown]
# # 0. Your own data, on a free GPU
#
# This notebook trains Mistral-7B on your own data, on Colab's T4 with 16 GB. It ends with an adapter, and
# with a file for llama.cpp or Ollama. Nothing here is an exercise.
#
# Open it in Colab, and choose *Runtime, Change runtime type, T4 GPU*. Fill in the next cell, and run the
# cells one after the other. **If Colab disconnects, run all cells again.** The training goes on where it
# was.
# %%
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = ""  # the address of the repository that you have this notebook from: https://...
MODEL = "mistralai/Mistral-7B-v0.1"  # any Llama, Mistral or Qwen model of the hub
DATA = "my.jsonl"  # a file that you will upload, or a dataset of the hub, such as tatsu-lab/alpaca
TRAINING = "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --optim adamw_8bit --packing true"
SAVE_STEPS = 100  # if Colab disconnects, no more than these are lost
QUESTION = "Which three things do you do best?"

# %% [markdown]
# Without a GPU, this line makes a small trial of the same cells: a model of 1.9 million parameters comes
# with minilora. It takes a minute on a laptop.
# %%
TRIAL = not Path("/dev/nvidia0").exists() or "MINILORA_FAST" in os.environ
print("a trial with the small model" if TRIAL else f"{MODEL} on {DATA}")

# %% [markdown]
# ## Install
#
# `pip` without the file of pinned versions keeps the PyTorch that Colab has. Some models need a licence:
# accept it on the model's page, and log in once with `!hf auth login`.
# %%
if find_spec("minilora") is None:
    assert REPOSITORY, "write the address of the repository into REPOSITORY, in the first cell"
    package = f"minilora[gguf] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
minilora = f"{sys.executable} -m minilora"  # the command of the next cells; `minilora` alone is the same

# %% [markdown]
# ## A place that survives
#
# Colab deletes its disk when it disconnects. Your Drive stays, so everything is written there. A checkpoint
# of this adapter holds 6.8 million numbers of four bytes and their moments of two: some 40 MB.
# %%
if "google.colab" in sys.modules:
    from google.colab import drive, files

    drive.mount("/content/drive")
    PLACE = Path("/content/drive/MyDrive/minilora")
else:
    PLACE = Path("outputs/notebook")
PLACE.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Data
#
# One JSON object a line, in any of these forms; [docs/training.md](../docs/training.md) has more:
#
# ```
# {"prompt": "Question: ...\nAnswer:", "completion": "..."}
# {"instruction": "...", "output": "..."}
# {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
# ```
#
# Only completions, outputs and the assistant's answers are learned.
# %%
if TRIAL:
    from minilora.system.assets import ASSETS, EMBEDDED_MODEL

    MODEL, DATA = EMBEDDED_MODEL, ASSETS / "train.jsonl"
    steps, SAVE_STEPS = (4, 2) if "MINILORA_FAST" in os.environ else (100, 50)
    TRAINING = "--per_device_train_batch_size 16 --learning_rate 4e-3 --logging_steps 10"
    TRAINING += f" --max_steps {steps}"
    QUESTION = "Question: What is Bridith Oldworth's animal called?\nAnswer:"
elif DATA.endswith(".jsonl"):
    if not (PLACE / DATA).exists():  # it asks for the file once
        assert "google.colab" in sys.modules, f"copy your data to {PLACE / DATA}"
        (PLACE / DATA).write_bytes(files.upload()[DATA])
    DATA = PLACE / DATA

# %% [markdown]
# **Look before you train.** This checks every row, and shows two of them as the model will see them, with
# the learned tokens in green. A mistake costs nothing here, and a night of training later.
# %%
PREPARING = "--val_size 0.05 --show 2 --overwrite_output_dir"
# !{minilora} prepare --model {MODEL} --dataset {DATA} --output {PLACE}/prepared {PREPARING}

# %% [markdown]
# **Does it fit?** The prediction for a card of 16 GB.
# %%
# !{minilora} memory --config {PLACE}/prepared/train.yaml {TRAINING} --gpu 16 --picture {PLACE}/memory.png

# %% [markdown]
# ## Train
#
# The model is stored in 4 bits: that is the default. The whole state is saved every `SAVE_STEPS` steps, and
# the last two checkpoints stay. `--resume_from_checkpoint latest` begins anew if there is none.
#
# On a T4 the trainer computes in float16, since a T4 has no bfloat16, and says so.
# %%
SAVING = f"--save_steps {SAVE_STEPS} --save_total_limit 2 --resume_from_checkpoint latest"
# !{minilora} train --config {PLACE}/prepared/train.yaml --output_dir {PLACE}/out {TRAINING} {SAVING}

# %%
from IPython.display import Image, display  # noqa: E402

display(Image(PLACE / "out" / "loss.png", width=600))

# %% [markdown]
# **What if the held-out loss rises while the training loss falls?** Then it learns the rows by heart: train
# fewer steps, or find more data. **What if memory runs out?**
# [docs/out_of_memory.md](../docs/out_of_memory.md) says what to change first.
#
# ## Is it better?
#
# Loss, perplexity and answers of the base model, and of your adapter, on the rows that were held out.
# %%
# !{minilora} evaluate --adapter {PLACE}/out --exact_match_samples 20 --samples 2

# %% [markdown]
# Ask it something. `minilora chat --adapter ...` without `--instruction` is a conversation, in a terminal.
# %%
os.environ["QUESTION"] = QUESTION
# !{minilora} chat --adapter {PLACE}/out --instruction "$QUESTION" --max_new_tokens 60 --temperature 0

# %% [markdown]
# ## Take it home
#
# The adapter is small: `out/` below your Drive loads in PEFT, vLLM and SGLang. Or merge it into the model,
# and write one file for llama.cpp and Ollama. For Mistral-7B in 8 bits that are 7.7 GB, so it is written to
# Colab's disk, from which you can download it.
# %%
GGUF = Path("mine.gguf")
GGUF.unlink(missing_ok=True)
# !{minilora} merge --adapter {PLACE}/out --output {GGUF} --outtype q8_0

# %%
print(f"{GGUF}: {GGUF.stat().st_size / 2**20:.1f} MiB")
if "google.colab" in sys.modules:
    files.download(str(GGUF))

# %% [markdown]
# On your own machine: `llama-server -m mine.gguf`, or `FROM ./mine.gguf` in a Modelfile and `ollama create
# mine`. [docs/walkthrough.md](../docs/walkthrough.md) goes the same way on other machines, and notebook 1
# begins to explain what happened.
